"""LLaVA-1.5 in transformers: where its decoder is and where its images lie."""

from __future__ import annotations

import numpy as np
from torch import nn

from ..layout import LayoutError, VisualLayout
from .family import Family


def outer_model(model: nn.Module) -> nn.Module:
    """The module whose arguments tell the layout; it holds the text model as `language_model`."""
    return getattr(model, "model", model)


def read_layout(outer: nn.Module, arguments: dict, past: int) -> VisualLayout | None:
    """The layout of a call of the outer model, from `input_ids` against the image token; None if it cannot be told.

    past: columns in the KV cache before the call. Raises LayoutError if the image tokens are no whole grids.
    """
    input_ids = arguments.get("input_ids")
    if input_ids is None:
        return None
    # `generate` runs the vision tower beforehand and hands its output over instead of the pixels
    encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
    pixel_values = arguments.get("pixel_values")
    if pixel_values is None and encoded is None:
        return VisualLayout(input_ids.shape[0])
    grid = _grid(outer, arguments, pixel_values)
    size = grid[0] * grid[1]
    samples = []
    for index, row in enumerate((input_ids == outer.config.image_token_id).cpu().numpy()):
        starts = []
        for run in np.split(np.flatnonzero(row), np.flatnonzero(np.diff(np.flatnonzero(row)) != 1) + 1):
            if len(run) % size:
                raise LayoutError(
                    f"input_ids: sample {index}: got {len(run)} image tokens in a row, expected a multiple of "
                    f"{size} ({grid[0]}x{grid[1]} tokens an image)"
                )
            starts += [int(start) for start in run[::size]]
        samples.append([(start + past, (1, *grid)) for start in starts])
    return VisualLayout.from_grids(samples)


def _grid(outer: nn.Module, arguments: dict, pixel_values) -> tuple[int, int]:
    strategy = arguments.get("vision_feature_select_strategy") or outer.config.vision_feature_select_strategy
    if strategy != "default":
        raise LayoutError(
            f"vision_feature_select_strategy: got {strategy!r}, expected 'default' (class tokens lie in no grid)"
        )
    vision = outer.config.vision_config
    height, width = (vision.image_size,) * 2 if pixel_values is None else pixel_values.shape[-2:]
    return height // vision.patch_size, width // vision.patch_size


FAMILY = Family(("LlavaForConditionalGeneration", "LlavaModel"), outer_model, read_layout)
