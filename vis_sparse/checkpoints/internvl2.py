"""Original InternVL2 checkpoints (1B to 26B) in transformers' own class, one shard at a time.

transformers does not know their `model_type` without remote code, which does not run on today's transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, InternVLForConditionalGeneration

from ..plans.atomic_write import replaced
from .errors import CheckpointError
from .internvl2_format import read_config, translate

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
    folder = Path(folder)
    config = read_config(folder, image_token_id)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    text_model = model.model.language_model
    # the one module with buffers that no checkpoint holds
    text_model.rotary_emb = type(text_model.rotary_emb)(config=config.text_config)
    places = _places(model, device_map, dtype)
    expected = set(model.state_dict())
    for shard in _shards(folder):
        for name, tensor in _translated(shard, config):
            if name not in expected:
                raise CheckpointError(f"{shard.name}: got a tensor for {name}, expected it once and in the model")
            expected.remove(name)
            owner, _, leaf = name.rpartition(".")
            kept = tensor.to(_place(name, places), dtype, copy=True)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=kept.is_floating_point()))
    if expected:
        raise CheckpointError(f"folder: got no tensor for {sorted(expected)[0]} and {len(expected) - 1} more")
    model.config.dtype = next(model.parameters()).dtype
    text_model.rotary_emb.to(text_model.embed_tokens.weight.device)
    model.generation_config = GenerationConfig.from_model_config(config)
    if len(set(places.values())) > 1:
        from accelerate import dispatch_model

        dispatch_model(model, places)
    return model.eval()


def convert_internvl2(folder: str | Path, output: str | Path, image_token_id: int | None = None) -> None:
    """Write the checkpoint in `folder` as one that `from_pretrained` loads, shard by shard, to the folder `output`.

    Arguments as in `load_internvl2`. Raises CheckpointError if `output` exists and is not empty.
    """
    folder, output = Path(folder), Path(output)
    config = read_config(folder, image_token_id)
    if output.is_dir() and any(output.iterdir()):
        raise CheckpointError(f"output: got {output} with files in it, expected a new or an empty folder")
    output.mkdir(parents=True, exist_ok=True)
    shards, weight_map, size = _shards(folder), {}, 0
    for shard in shards:
        tensors = {name: tensor.contiguous() for name, tensor in _translated(shard, config)}
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
    names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"folder: got {folder} without {missing[0]}, expected every shard of {_INDEX}")
    return [folder / name for name in names]


def _translated(shard: Path, config) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(shard, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield from translate(name, file.get_tensor(name), config)


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
