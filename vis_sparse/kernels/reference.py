"""Reference backend: dense masks over all pairs, softmax written out. Any dtype; the others are held to it."""

from __future__ import annotations

import torch
from einops import rearrange, repeat

from .patterns import TextPattern, VisualPattern


def text_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: TextPattern, scale: float
) -> torch.Tensor:
    """Attention of text queries.

    query (batch, Q, heads, head_dim); key, value (batch, S, kv_heads, head_dim). Returns the query's shape.
    """
    allowed = None if pattern.mask is None else pattern.mask.allowed
    return attention(query, key, value, allowed, scale)


def visual_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: VisualPattern, scale: float
) -> torch.Tensor:
    """Attention of packed visual queries.

    query (num_visual, heads, head_dim); key, value (batch, slots, kv_heads, head_dim). Returns the query's shape.
    """
    flat_key, flat_value = (rearrange(t, "batch slot ... -> 1 (batch slot) ...") for t in (key, value))
    return attention(query[None], flat_key, flat_value, pattern.dense_mask.allowed, scale)[0]


def attention_mass(query: torch.Tensor, key: torch.Tensor, pattern: TextPattern, scale: float) -> torch.Tensor:
    """The share of each text query's attention that falls on visual keys, in every head.

    query (batch, Q, heads, head_dim); key (batch, S, kv_heads, head_dim). Returns (batch, Q, heads); 0 for a padding
    query that reads nothing.
    """
    is_visual = repeat(pattern.is_visual.to(query.dtype), "batch slot -> batch slot kv 1", kv=key.shape[2])
    allowed = None if pattern.mask is None else pattern.mask.allowed
    return attention(query, key, is_visual, allowed, scale)[..., 0]


def attention(query, key, value, allowed: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Softmax attention over the keys that `allowed` (bool, broadcastable to batch, heads, Q, S) lets through."""
    groups = query.shape[2] // key.shape[2]
    key, value = (repeat(t, "batch slot kv dim -> batch slot (kv group) dim", group=groups) for t in (key, value))
    scores = torch.einsum("bqhd,bshd->bhqs", query, key) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    # a padding query may read nothing: its weights become 0, not NaN
    weights = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1).nan_to_num(0.0)
    return torch.einsum("bhqs,bshd->bqhd", weights.to(query.dtype), value)
