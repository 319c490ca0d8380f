"""The `torch` backend: scaled_dot_product_attention over tiles of the grid. The default without a GPU."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .patterns import Mask, TextPattern, VisualPattern


def text_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: TextPattern, scale: float
) -> torch.Tensor:
    """As `reference.text_attention`."""
    causal = pattern.is_causal
    return _attention(query, key, value, None if causal else pattern.mask, causal, scale)


def visual_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: VisualPattern, scale: float
) -> torch.Tensor:
    """As `reference.visual_attention`: every tile of queries reads the key rows of its halo, in one call."""
    tiles = pattern.tiles
    queries = _rows(query, tiles.query)
    keys, values = (_rows(t.flatten(0, 1), tiles.key) for t in (key, value))
    out = _attention(queries, keys, values, tiles.mask, False, scale).flatten(0, 1)
    return out if tiles.position is None else out.index_select(0, tiles.position)


def attention_mass(query: torch.Tensor, key: torch.Tensor, pattern: TextPattern, scale: float) -> torch.Tensor:
    """As `reference.attention_mass`: attention over values that are 1 at visual keys, so that no matrix is formed."""
    is_visual = pattern.is_visual.to(query.dtype)[:, :, None, None].expand(-1, -1, -1, key.shape[3]).contiguous()
    return text_attention(query, key, is_visual.expand(-1, -1, key.shape[2], -1), pattern, scale)[..., 0]


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def _attention(query, key, value, mask: Mask | None, causal: bool, scale: float) -> torch.Tensor:
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if mask is None else mask.bias(query.dtype),
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)
