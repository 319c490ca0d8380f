"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: a base view, then the tiles of an AnyRes image as one grid.

The tiles' grid has its padding cut off, and a newline token as its last column.
"""

from __future__ import annotations

import math

from torch import nn

from ..layout.image_grids import AnyRes, OneVision
from .llava import TOWERS, check_strategy
from .placeholders import Grid, Visual, family


def _side(outer: nn.Module) -> int:
    vision = outer.config.vision_config
    return vision.image_size // vision.patch_size


def _rule(outer: nn.Module) -> dict:
    """Settings of the image rule that a config holds."""
    size, side = outer.config.vision_config.image_size, _side(outer)
    pinpoints = tuple(map(tuple, outer.config.image_grid_pinpoints))
    return {"tile": size, "grid": (side, side), "pinpoints": pinpoints, "default_size": (size, size)}


def _next_grids(outer: nn.Module, arguments: dict) -> list[Grid]:
    # image_sizes (images, 2): height and width in pixels
    check_strategy(outer, arguments)
    rule = AnyRes(**_rule(outer))
    return [grid for image in arguments["image_sizes"] for grid in rule.encode(*map(int, image)).grids]


def _videos(arguments: dict):
    """(videos, frames, channels, height, width); older transformers call them as they do images."""
    return arguments.get("pixel_values_videos", arguments.get("pixel_values"))


def _pooled_frames(outer: nn.Module, arguments: dict) -> list[Grid]:
    check_strategy(outer, arguments)
    videos, frames = _videos(arguments).shape[:2]
    side = _side(outer) // outer.config.spatial_pool_stride
    return [(frames, side, side)] * videos


def _onevision_grids(outer: nn.Module, arguments: dict) -> list[Grid]:
    # samples with several images have them as base views, each with one newline token after it
    counts = arguments.get("batch_num_images")
    is_tiled = [True] * len(arguments["image_sizes"]) if counts is None else [n == 1 for n in counts for _ in range(n)]
    limit = arguments.get("vision_aspect_ratio") or outer.config.vision_aspect_ratio
    rule = OneVision(**_rule(outer), max_tiles=int(limit.removeprefix("anyres_max_")))
    encoded = (
        rule.encode(*map(int, image)) if tiled else rule.encode_one_of_several()
        for image, tiled in zip(arguments["image_sizes"], is_tiled, strict=True)
    )
    return [grid for image in encoded for grid in image.grids]


def _onevision_frames(outer: nn.Module, arguments: dict) -> list[Grid]:
    # halved frames, and one newline token after the last
    videos, frames = _videos(arguments).shape[:2]
    side = math.ceil(_side(outer) / 2)
    return [(frames, side, side), (1, 1, 1)] * videos


_OF_TILES = "the tokens of its tiles are put together, cut and pooled behind the tower"
_NOT_BEFORE = {"duplicate": _OF_TILES, "received": _OF_TILES}
_NEXT = Visual("pixel_values", _next_grids)

LLAVA_NEXT = family(
    "LlavaNextForConditionalGeneration", "LlavaNextModel", towers=TOWERS, not_before=_NOT_BEFORE, image=_NEXT
)
LLAVA_NEXT_VIDEO = family(
    "LlavaNextVideoForConditionalGeneration",
    "LlavaNextVideoModel",
    towers=TOWERS,
    not_before=_NOT_BEFORE,
    image=_NEXT,
    video=Visual("pixel_values_videos", _pooled_frames),
)
LLAVA_ONEVISION = family(
    "LlavaOnevisionForConditionalGeneration",
    "LlavaOnevisionModel",
    towers=TOWERS,
    not_before=_NOT_BEFORE,
    image=Visual("pixel_values", _onevision_grids),
    video=Visual("pixel_values_videos", _onevision_frames),
)
