"""InternVL in transformers: every tile of an image, and every frame of a video, is a grid of its own."""

from __future__ import annotations

from torch import nn

from .llava import check_strategy
from .placeholders import Grid, Visual, family
from .tower_vit import INTERN_VIT


def _grids(outer: nn.Module, arguments: dict) -> list[Grid]:
    # pixel_values (tiles, channels, height, width); the processor puts the frames of videos there too
    check_strategy(outer, arguments)
    config, pixels = outer.config, arguments["pixel_values"]
    patch = config.vision_config.patch_size
    height, width = (int(pixels.shape[axis] // patch[axis] * config.downsample_ratio) for axis in (-2, -1))
    return [(1, height, width)] * len(pixels)


def _merge(outer: nn.Module) -> int:
    return round(1 / outer.config.downsample_ratio)


INTERNVL = family(
    "InternVLForConditionalGeneration",
    "InternVLModel",
    towers=(INTERN_VIT,),
    merge=_merge,
    not_before={"change": "its calls do not tell the frames of a video from the tiles of an image"},
    image=Visual("pixel_values", _grids),
)
