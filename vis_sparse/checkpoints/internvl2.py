"""Original InternVL2 checkpoints (1B to 26B) in transformers' own class, one shard at a time.

transformers does not know their `model_type` without remote code, which does not run on today's transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration

from ..plans.atomic_write import is_file, replaced
from ..plans.layer_plan import brief, reason
from .errors import MALFORMED, CheckpointError
from .internvl2_format import read_config, read_object, translate

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# tokenizers travel along; code and weights in other formats do not
_COPIED = ("tokenizer*", "*tokens*.json", "vocab.json", "merges.txt", "preprocessor_config.json")


def load_internvl2(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device_map: str | int | torch.device | dict[str, int | str | torch.device] | None = None,
    image_token_id: int | None = None,
) -> InternVLForConditionalGeneration:
    """The original InternVL2 checkpoint in `folder` as transformers' InternVLForConditionalGeneration.

    dtype: of the weights; None: as stored. device_map: a device, "auto", or module names to devices (the latter two
    need accelerate); None: the CPU. image_token_id: of `<IMG_CONTEXT>`; None: read from the tokenizer files beside
    the weights. Besides the model itself no more than one tensor is held. Raises CheckpointError for folders that
    hold something else.
    """
    folder, config = _read(folder, image_token_id)
    shards = _shards(folder)
    model = _empty(config)
    text_model = model.model.language_model
    # the one module with buffers that no checkpoint holds
    text_model.rotary_emb = type(text_model.rotary_emb)(config=config.text_config)
    places = _places(model, device_map, dtype)
    for _, tensors in _translated(shards, config, model):
        for name, tensor in tensors:
            owner, _, leaf = name.rpartition(".")
            kept = tensor.to(_place(name, places), dtype, copy=True)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=kept.is_floating_point()))
    model.config.dtype = next(model.parameters()).dtype
    text_model.rotary_emb.to(text_model.embed_tokens.weight.device)
    model.generation_config = GenerationConfig.from_model_config(config)
    if len(set(places.values())) > 1:
        from accelerate import dispatch_model

        dispatch_model(model, places)
    return model.eval()


def convert_internvl2(folder: str | Path, output: str | Path, image_token_id: int | None = None) -> None:
    """Write the checkpoint in `folder` as one that `from_pretrained` loads, shard by shard, to the folder `output`.

    Arguments as in `load_internvl2`. What is not finished lies in a folder beside it. Raises CheckpointError if
    `output` exists and is not empty.
    """
    folder, config = _read(folder, image_token_id)
    shards = _shards(folder)
    with _new_folder(output) as output:
        _write(folder, config, shards, output)


@contextmanager
def _new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write to; at the end of the block it becomes `output`, at an error it is gone."""
    try:
        output = Path(output)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"output: got {output} with files in it, expected a new or an empty folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"output: got {brief(output)}, expected a folder to write ({reason(error)})") from None
    try:
        yield new
        new.chmod(0o755)
        os.replace(new, output)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(folder: Path, config, shards: list[Path], output: Path) -> None:
    weight_map, size = {}, 0
    for shard, translated in _translated(shards, config, _empty(config)):
        tensors = {name: tensor.contiguous() for name, tensor in translated}
        weight_map |= dict.fromkeys(tensors, shard.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        with replaced(output / shard.name) as new:
            save_file(tensors, new, metadata={"format": "pt"})
        config.dtype = next(iter(tensors.values())).dtype
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (output / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config.architectures = [InternVLForConditionalGeneration.__name__]
    config.save_pretrained(output)
    GenerationConfig.from_model_config(config).save_pretrained(output)
    for file in {file for pattern in _COPIED for file in folder.glob(pattern)}:
        shutil.copy(file, output)


def _shards(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise CheckpointError(f"folder: got {folder}, expected {_SINGLE} or {_INDEX} in it")
    weight_map = read_object(folder / _INDEX).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{folder / _INDEX}: got {brief(weight_map)}, expected files of this folder by tensor")
    names = sorted(names)
    missing = [name for name in names if not is_file(folder / name)]
    if missing:
        raise CheckpointError(f"folder: got {folder} without {missing[0]}, expected every shard of {_INDEX}")
    return [folder / name for name in names]


def _read(folder: str | Path, image_token_id: int | None) -> tuple[Path, InternVLConfig]:
    if not isinstance(folder, str | Path):
        raise CheckpointError(f"folder: got {brief(folder)}, expected a folder")
    return Path(folder), read_config(Path(folder), image_token_id)


def _empty(config) -> InternVLForConditionalGeneration:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return InternVLForConditionalGeneration(config)
    except MALFORMED as error:
        raise CheckpointError(f"config.json: expected sizes of an InternVL2 checkpoint ({reason(error)})") from None


def _translated(shards, config, model: nn.Module) -> Iterator[tuple[Path, Iterator[tuple[str, torch.Tensor]]]]:
    """Each shard, with the names and tensors that its own ones become: those of the model, each once, and all."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for shard in shards:
        yield shard, _of_shard(shard, config, expected)
    if expected:
        raise CheckpointError(f"folder: got no tensor for {sorted(expected)[0]} and {len(expected) - 1} more")


def _of_shard(shard: Path, config, expected: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(shard, framework="pt") as file:
            for old in file.keys():  # noqa: SIM118 (not a mapping)
                for name, tensor in translate(old, file.get_tensor(old), config):
                    if name not in expected:
                        given = f"{shard.name}: got a tensor for {name}"
                        raise CheckpointError(f"{given}, expected it once and in the model")
                    shape = expected.pop(name)
                    if tensor.shape != shape:
                        raise CheckpointError(
                            f"{shard.name}: got {old} that gives {name} of shape {tuple(tensor.shape)}, expected "
                            f"{tuple(shape)}"
                        )
                    yield name, tensor
    except CheckpointError:
        raise
    except (SafetensorError, OSError, *MALFORMED) as error:
        raise CheckpointError(f"{shard}: expected tensors of an InternVL2 checkpoint ({reason(error)})") from None


def _places(model: nn.Module, device_map, dtype) -> dict[str, torch.device | int | str]:
    """Device of every module, by the start of its name."""
    if isinstance(device_map, dict):
        return device_map
    if device_map == "auto":
        from accelerate import infer_auto_device_map

        return infer_auto_device_map(model, no_split_module_classes=model._no_split_modules, dtype=dtype)
    return {"": torch.device("cpu") if device_map is None else device_map}


def _place(name: str, places: dict):
    fitting = [start for start in places if not start or name == start or name.startswith(f"{start}.")]
    if not fitting:
        raise CheckpointError(f"device_map: got no device for {name}, expected one for every module")
    return places[max(fitting, key=len)]
