"""The scores by which visual tokens go on or leave: one number a token, never an attention matrix."""

from __future__ import annotations

import numpy as np
import torch

_QUERIES = 256  # whose attention is formed at a time


def attention_received(
    query: torch.Tensor, key: torch.Tensor, unread: torch.Tensor | None, heads: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The share of each sample's query that every key slot gets, mean over the heads, (batch, slots).

    query (batch, heads, head_dim), one row a sample; key (batch, slots, kv_heads, head_dim); unread: (batch, slots)
    bool, the slots that are not read, None for none; heads: those that count, None for all.
    """
    grouped = query.unflatten(1, (key.shape[2], -1))
    scores = (grouped @ key.permute(0, 2, 3, 1)).flatten(1, 2)
    scores = scores.to(wide(scores.dtype)) * scale
    if unread is not None:
        scores = scores.masked_fill(unread[:, None], -torch.inf)
    shares = scores.softmax(-1)
    return (shares if heads is None else shares.index_select(1, heads)).mean(1)


def received_by_all(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """The share of a part's queries that each of its keys gets, mean over queries and heads, (parts, keys).

    query (parts, queries, heads, head_dim), key (parts, keys, heads, head_dim). Some queries at a time.
    """
    keys, received = key.permute(0, 2, 3, 1), 0
    for some in query.split(max(1, _QUERIES // len(query)), 1):
        scores = (some.transpose(1, 2) @ keys).to(wide(query.dtype)) * scale
        received = received + scores.softmax(-1).sum((1, 2))
    return received / (query.shape[1] * query.shape[2])


def norms(rows: torch.Tensor) -> torch.Tensor:
    """L2 norms of rows (n, d), in fp32 at least."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=wide(rows.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_host(scores: torch.Tensor) -> np.ndarray:
    """Scores as an array: the one wait for the device. Where there are no values (meta device), all are equal."""
    return np.zeros(scores.shape) if scores.is_meta else scores.cpu().numpy()
