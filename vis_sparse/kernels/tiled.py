"""The `torch` backend: scaled_dot_product_attention over tiles of the grid. The default without a GPU."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .patterns import TextPattern, VisualPattern

# Copies of keys and values made at a time: few enough to stay in the last cache level and to get memory that the
# allocator already has, enough for a call to be worth its dispatch.
_COPIED_BYTES = 8 * 2**20


def text_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: TextPattern, scale: float
) -> torch.Tensor:
    """As `reference.text_attention`."""
    causal = pattern.is_causal
    bias = None if causal or pattern.mask is None else pattern.mask.bias(query.dtype)
    return _attention(query, key, value, bias, causal, scale)


def visual_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: VisualPattern, scale: float
) -> torch.Tensor:
    """As `reference.visual_attention`: every tile of queries reads a copy of the key rows of its halo, some tiles at a
    time, so that the copies are read again while they are still in the cache."""
    key, value, parts = key.flatten(0, 1), value.flatten(0, 1), []
    for group in pattern.tiles.groups:
        bias = group.mask.bias(query.dtype)
        tile_bytes = 2 * group.key.shape[1] * key[0].numel() * key.element_size()
        step = max(_COPIED_BYTES // tile_bytes, 1)
        for start in range(0, len(group.query), step):
            tiles = slice(start, start + step)
            queries = _rows(query, group.query[tiles])
            keys, values = (_rows(t, group.key[tiles]) for t in (key, value))
            parts.append(_attention(queries, keys, values, bias[tiles], False, scale).flatten(0, 1))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if pattern.tiles.position is None else out.index_select(0, pattern.tiles.position)


def attention_mass(query: torch.Tensor, key: torch.Tensor, pattern: TextPattern, scale: float) -> torch.Tensor:
    """As `reference.attention_mass`: attention over values that are 1 at visual keys, so that no matrix is formed."""
    is_visual = pattern.is_visual.to(query.dtype)[:, :, None, None].expand(-1, -1, -1, key.shape[3]).contiguous()
    return text_attention(query, key, is_visual.expand(-1, -1, key.shape[2], -1), pattern, scale)[..., 0]


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def _attention(query, key, value, bias: torch.Tensor | None, causal: bool, scale: float) -> torch.Tensor:
    (batch, queries, heads, width), kv_heads = query.shape, key.size(2)
    if queries == 1 and heads != kv_heads:
        # one query a head: the heads of a group are the rows of one product, and no key is copied for each
        grouped = query.view(batch, kv_heads, heads // kv_heads, width)
        if bias is not None and bias.shape[1] > 1:
            bias = bias.unflatten(1, (kv_heads, heads // kv_heads)).squeeze(3)
        out = F.scaled_dot_product_attention(
            grouped, key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias, scale=scale
        )
        return out.reshape(batch, 1, heads, -1)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=bias,
        is_causal=causal,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out.transpose(1, 2)
