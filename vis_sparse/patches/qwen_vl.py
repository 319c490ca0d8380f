"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: grids of any shape, merged from patches."""

from __future__ import annotations

from torch import nn

from .placeholders import Grid, Visual, family
from .tower_qwen import QWEN2_5_TOWER, QWEN2_TOWER, QWEN3_TOWER


def _merged(outer: nn.Module, grid_thw) -> list[Grid]:
    merge = _merge(outer)
    return [(frames, height // merge, width // merge) for frames, height, width in grid_thw.tolist()]


def _image_grids(outer: nn.Module, arguments: dict) -> list[Grid]:
    # image_grid_thw (images, 3), in patches
    return _merged(outer, arguments["image_grid_thw"])


def _video_grids(outer: nn.Module, arguments: dict) -> list[Grid]:
    # video_grid_thw (videos, 3), in patches; all frames in a row
    return _merged(outer, arguments["video_grid_thw"])


def _frame_grids(outer: nn.Module, arguments: dict) -> list[Grid]:
    # a timestamp before each frame
    return [(1, *grid[1:]) for grid in _video_grids(outer, arguments) for _ in range(grid[0])]


def _merge(outer: nn.Module) -> int:
    return outer.config.vision_config.spatial_merge_size


_IMAGE = Visual("pixel_values", _image_grids)

QWEN2_VL = family(
    "Qwen2VLForConditionalGeneration",
    "Qwen2VLModel",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLModel",
    towers=(QWEN2_TOWER, QWEN2_5_TOWER),
    merge=_merge,
    image=_IMAGE,
    video=Visual("pixel_values_videos", _video_grids),
)
QWEN3_VL = family(
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLModel",
    towers=(QWEN3_TOWER,),
    merge=_merge,
    not_before={"change": "each frame of its videos is a grid of its own, with a timestamp before it"},
    image=_IMAGE,
    video=Visual("pixel_values_videos", _frame_grids),
)
