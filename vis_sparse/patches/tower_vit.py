"""ViTs over images of one size in a batch: CLIP, SigLIP, InternViT."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..executor.tower_tables import TowerRows
from .tower import TowerKind

_CLIP_PLACES = {
    "input_norm": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.out_proj",
    "post_norm": "layer_norm2",
    "up": "mlp.fc1",
    "activation": "mlp.activation_fn",
    "down": "mlp.fc2",
}
_CLIP_BLOCKS = ("encoder.layers", "vision_model.encoder.layers")


def _patches(tower: nn.Module, arguments: dict, globals_: int) -> TowerRows:
    # pixel_values (images, channels, height, width)
    pixels, patch = arguments["pixel_values"], tower.config.patch_size
    down, across = patch if isinstance(patch, list | tuple) else (patch, patch)
    height, width = pixels.shape[-2] // down, pixels.shape[-1] // across
    y, x = (np.concatenate([np.full(globals_, -1), axis.ravel()]) for axis in np.indices((height, width)))
    images = len(pixels)
    return TowerRows(np.repeat(np.arange(images), len(y)), np.tile(y, images), np.tile(x, images))


def _with_class_token(tower: nn.Module, arguments: dict) -> TowerRows:
    return _patches(tower, arguments, 1)


def _without(tower: nn.Module, arguments: dict) -> TowerRows:
    return _patches(tower, arguments, 0)


def _pixels(tower: nn.Module, arguments: dict, merge: int) -> torch.Tensor:
    pixels, patch = arguments["pixel_values"], tower.config.patch_size
    sides = patch if isinstance(patch, list | tuple) else (patch, patch)
    down, across = (side * merge for side in sides)
    height, width = (count // side for count, side in zip(pixels.shape[-2:], (down, across)))
    pixels = pixels[..., : height * down, : width * across].unflatten(-2, (height, down)).unflatten(-1, (width, across))
    return pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


def _masked(rows: TowerRows, cos, sin) -> dict:
    return {"attention_mask": None}


def _nothing(rows: TowerRows, cos, sin) -> dict:
    return {}


CLIP = TowerKind(
    ("CLIPVisionModel",),
    "vision_tower",
    _CLIP_BLOCKS,
    _CLIP_PLACES,
    "self_attn",
    _with_class_token,
    _masked,
    _pixels,
    has_globals=True,
)
SIGLIP = TowerKind(
    ("SiglipVisionModel",), "vision_tower", _CLIP_BLOCKS, _CLIP_PLACES, "self_attn", _without, _masked, _pixels
)
INTERN_VIT = TowerKind(
    ("InternVLVisionModel",),
    "vision_tower",
    ("encoder.layer",),
    {
        "input_norm": "layernorm_before",
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "query_norm": "attention.q_norm",
        "key_norm": "attention.k_norm",
        "output": "attention.projection_layer",
        "post_norm": "layernorm_after",
        "up": "mlp.fc1",
        "activation": "mlp.activation_fn",
        "down": "mlp.fc2",
    },
    "attention",
    _with_class_token,
    _nothing,
    _pixels,
    scales=("lambda_1", "lambda_2"),
    has_globals=True,
)
