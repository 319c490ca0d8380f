"""The original `llava` package: images enter by `images=`, and their features take the place of token -200.

The layout comes from that splicing: in a call of `forward` it happens inside, in `generate` before the first one.
"""

from __future__ import annotations

import ast
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from ..layout.image_grids import AnyRes
from ..layout.layout import LayoutError, VisualLayout
from ..plans.budgets import load_heads
from ..plans.layer_plan import PlanError
from ..plans.plan import VisualPlan
from .family import Family, prompt_ends
from .placeholders import Grid
from .scopes import held

_IMAGE_TOKEN = -200
_SETTINGS = ("attncut_w", "layercut_num", "mlpcut_ratio")


def released_plan(model: nn.Module, heads: str | Path | ArrayLike) -> VisualPlan:
    """The plan that a released YOPO checkpoint was trained under, from its config (arXiv 2410.06169, official code).

    heads: its head mask, a `.npy` or `.safetensors` file or a bool array (layers, heads), True = kept; the config's
    `headcut_num` only names it. The image's position (`sprompt_len` there) comes from each call. Raises PlanError if
    the config lacks a setting.
    """
    config = model.config
    missing = [name for name in _SETTINGS if getattr(config, name, None) is None]
    if missing:
        raise PlanError(f"config: got no {', '.join(missing)}, expected those of a released YOPO checkpoint")
    mask = load_heads(heads) if not hasattr(heads, "tolist") else np.asarray(heads)
    window, layer_cut, ratio = (getattr(config, name) for name in _SETTINGS)
    return VisualPlan.yopo(
        config.num_hidden_layers, window, layer_cut, mask.tolist(), ffn_ratio=ratio, semantics="zero"
    )


def _read_layout(outer: nn.Module, arguments: dict, past: int) -> VisualLayout | None:
    generating = held(outer.model, "generating")
    if arguments.get("input_ids") is not None or generating is None or generating.layout is None:
        return None
    return generating.layout.expanded(len(arguments["inputs_embeds"]))


def _note_layout(
    state, plain, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
):
    """The splicing of features, after which layout and prompt are known."""
    prepared = plain(input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes)
    _, _, _, _, embeds, spliced_labels = prepared
    if embeds is not None:
        layout = _layout(state.outer, input_ids, attention_mask, images, image_sizes)
        if state.running is not None:
            state.running.layout = layout
            state.running.prompt_ends = None if spliced_labels is None else prompt_ends(spliced_labels)
        generating = held(state.text_model, "generating")
        if generating is not None:
            generating.layout, generating.prompt_ends = layout, np.array([embeds.shape[1]])
    return prepared


def _generate(state, plain, inputs=None, *args, **kwargs):
    # without images nothing is spliced: a prompt of text
    if inputs is not None:
        held(state.text_model, "generating").layout = VisualLayout(len(inputs))
    return plain(inputs, *args, **kwargs)


def _layout(outer, input_ids, attention_mask, images, image_sizes) -> VisualLayout:
    features = iter(_images(outer, images, image_sizes))
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    limit = getattr(outer.config, "tokenizer_model_max_length", None) or np.inf
    samples, lengths = [], []
    for row, real in zip(input_ids.cpu().numpy(), mask.bool().cpu().numpy(), strict=True):
        placed, at = [], 0
        for token in row[real]:
            for grid in next(features) if token == _IMAGE_TOKEN else ():
                placed.append((at, grid))
                at += int(np.prod(grid))
            at += token != _IMAGE_TOKEN
        if _IMAGE_TOKEN not in row[real]:
            next(features)  # the package skips an image there
        samples.append(_within(placed, limit))
        lengths.append(int(min(at, limit)))
    if getattr(outer.config, "tokenizer_padding_side", "right") == "left":
        longest = max(lengths)
        samples = [
            [(start + longest - length, grid) for start, grid in placed] for placed, length in zip(samples, lengths)
        ]
    return VisualLayout.from_grids(samples)


def _within(placed: list[tuple[int, Grid]], limit: float) -> list[tuple[int, Grid]]:
    for start, grid in placed:
        if start < limit < start + np.prod(grid):
            raise LayoutError(
                f"tokenizer_model_max_length: got {limit}, which cuts the image at {start}, expected more"
            )
    return [(start, grid) for start, grid in placed if start < limit]


def _images(outer, images, image_sizes) -> list[list[Grid]]:
    """The grids of every image."""
    tower = outer.get_vision_tower()
    if getattr(tower, "select_feature", "patch") != "patch":
        raise LayoutError(f"mm_vision_select_feature: got {tower.select_feature!r}, expected 'patch'")
    side = tower.num_patches_per_side
    base = (1, side, side)
    if not isinstance(images, list) and images.dim() != 5:
        return [[base] for _ in images]
    merge = getattr(outer.config, "mm_patch_merge_type", "flat")
    unpads = "unpad" in merge
    grids = []
    for index, image in enumerate(images):
        tiles = 1 if image.dim() == 3 else len(image)
        if merge == "flat":
            grids.append([base] * tiles)
        elif tiles == 1:
            grids.append([base, (1, 1, 1)] if unpads else [base])
        else:
            grids.append([base, _tiled(outer.config, image_sizes[index], tower.config.image_size, side, unpads)])
    return grids


def _tiled(config, image_size, tile: int, side: int, unpads: bool) -> Grid:
    """image_size and the config's pinpoints: (width, height) in pixels."""
    pinpoints = config.image_grid_pinpoints
    pinpoints = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    width, height = map(int, image_size)
    rule = AnyRes(tile, (side, side), tuple((h, w) for w, h in pinpoints), (tile, tile))
    rows, columns = (pixels // tile * side for pixels in rule.best_pinpoint(height, width))
    if not unpads:
        return 1, rows, columns
    # as AnyRes cuts, but for the rounding
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(height * (columns / width))) // 2)
    else:
        columns -= 2 * ((columns - int(width * (rows / height))) // 2)
    return 1, rows, columns + 1


def itself(model: nn.Module) -> nn.Module:
    return model


ORIGINAL_LLAVA = Family(
    ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"),
    _read_layout,
    {"prepare_inputs_labels_for_multimodal": _note_layout, "generate": _generate},
    outer_model=itself,
    text_model=attrgetter("model"),
    not_before=dict.fromkeys(("duplicate", "received"), "its vision tower does not run under plans"),
)
