"""What is shipped of a training: tower, projector and low-rank differences, by their published names."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vis_sparse.eval.deep.decoder import SCALE, place_of
from vis_sparse.eval.tiny.smol_files import LORA, shipped


def difference(state: Path) -> dict[str, Tensor]:
    """Of a run's `state.safetensors`."""
    tensors = {}
    with safe_open(state, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition("/")
            part, _, rest = name.partition(".")
            if kind != "weight" or part == "heads":
                continue
            tensors[_published(part, rest)] = file.get_tensor(key) * (SCALE if rest.endswith("-b") else 1)
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


def export(state: Path, file: Path) -> None:
    shipped(file, difference(state))
