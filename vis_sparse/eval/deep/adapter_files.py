"""An adapter of the deep model in peft's format: written by a training, read to be merged."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from vis_sparse.eval.deep.decoder import LINEARS, SCALE, Decoder, place_of
from vis_sparse.eval.tiny.smol_files import LORA

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS = "base_model.model.model.language_model.layers."
SIDES = {".a": ".lora_A.weight", ".b": ".lora_B.weight"}


def write(folder: Path, decoder: Decoder) -> None:
    """Config and fp16 tensors of a decoder's `lora`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, tensor in decoder.lora.items():
        layer, name, side = key.split("-")
        tensors[f"{LAYERS}{layer}.{place_of(name)}{SIDES[f'.{side}']}"] = tensor.detach().half().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors lets nobody else read its files
    config = {
        "peft_type": "LORA", "r": decoder.rank, "lora_alpha": int(SCALE * decoder.rank), "lora_dropout": 0.0,
        "bias": "none", "inference_mode": True, "fan_in_fan_out": False, "base_model_name_or_path": "tiny/smol",
        "target_modules": rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(LINEARS)})",
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read(folder: Path) -> dict[str, Tensor]:
    """A difference for `smol_files.merged`."""
    config = json.loads((folder / CONFIG).read_text())
    scale, found = config["lora_alpha"] / config["r"], {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        for side, ending in SIDES.items():
            if key.endswith(ending):
                name = f"{LORA}model.layers.{key.removeprefix(LAYERS).removesuffix(ending)}{side}"
                found[name] = tensor.float() * (scale if side == ".b" else 1)
    return found
