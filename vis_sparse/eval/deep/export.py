"""What is shipped of a training: tower, projector and low-rank differences, by their published names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vis_sparse.eval.deep.decoder import SCALE, place_of
from vis_sparse.eval.deep.run import STATE
from vis_sparse.eval.tiny.smol_files import DIFFERENCE, LORA, SHIPPED_FOLDER, shipped

SHIPPED = "shipped"  # in the place of a stage: what is in the package
WEIGHT = "weight/"


def weights_of(folder: Path, stage: str) -> dict[str, Tensor]:
    """Of a stage's run, or of what is shipped, by their names in a run."""
    if stage == SHIPPED:
        return restored(load_file(SHIPPED_FOLDER / DIFFERENCE))
    with safe_open(folder / stage / STATE, "pt") as file:
        return {key.removeprefix(WEIGHT): file.get_tensor(key) for key in file.keys() if key.startswith(WEIGHT)}  # noqa: SIM118


def difference(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A run's weights by their published names."""
    tensors = {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part != "heads":
            tensors[_published(part, rest)] = tensor * (SCALE if rest.endswith("-b") else 1)
    width = len(tensors["vision_tower.vision_model.pre_layrnorm.weight"])
    # a LLaVA has this layer, and takes its tokens from before it
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(width)
    tensors["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(width)
    return tensors


def _published(part: str, name: str) -> str:
    if part == "tower":
        return f"vision_tower.vision_model.{name}"
    if part == "projector":
        return f"multi_modal_projector.{name}"
    layer, linear, side = name.split("-")
    return f"{LORA}model.layers.{layer}.{place_of(linear)}.{side}"


def restored(difference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `difference` made it of, but for the tower's heads, which are not shipped."""
    weights = {}
    for name, tensor in difference.items():
        part, _, rest = name.partition(".")
        if part == "vision_tower":
            if "post_layernorm" not in rest:
                weights[f"tower.{rest.removeprefix('vision_model.')}"] = tensor.float()
        elif part == "multi_modal_projector":
            weights[f"projector.{rest}"] = tensor.float()
        else:
            _, _, layer, _, linear, side = rest.split(".")
            weights[f"lora.{layer}-{linear}-{side}"] = tensor.float() / (SCALE if side == "b" else 1)
    return weights


def export(folder: Path, stage: str, file: Path) -> None:
    """Write a stage's run as it is shipped."""
    shipped(file, difference(weights_of(folder, stage)))
