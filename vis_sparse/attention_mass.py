"""Where the attention of a few rows goes, without an attention matrix: sums over blocks of keys.

A temporary attention function, registered with transformers, runs SDPA as before and hands queries and keys to an
observer on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

OBSERVED = "vis_sparse_observed"
_BLOCK = 1024  # keys at a time

Observer = Callable[[nn.Module, torch.Tensor, torch.Tensor, float], None]
_observer: ContextVar[Observer] = ContextVar("vis_sparse_observer")


def visual_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    columns: torch.Tensor,
    is_visual: torch.Tensor,
    is_real: torch.Tensor,
    scale: float,
    block: int = _BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of causal attention on visual keys and on the others, (heads, rows) each; together 1.

    query (heads, rows, head_dim) of the rows at `columns` (rows,), ascending; key (kv_heads, length, head_dim);
    is_visual, is_real (length,) bool, keys that are not real are not read. Sums in fp32 at least, `block` keys at a
    time.
    """
    heads, rows, width = query.shape
    kv_heads, length, _ = key.shape
    grouped = query.reshape(kv_heads, -1, width)  # query heads that share a KV head side by side
    dtype = torch.promote_types(query.dtype, torch.float32)
    last = columns.repeat(heads // kv_heads)[:, None]
    top = torch.full((*grouped.shape[:2], 1), torch.finfo(dtype).min, dtype=dtype, device=query.device)
    sums = torch.zeros((*grouped.shape[:2], 2), dtype=dtype, device=query.device)
    kinds = torch.stack([is_visual, ~is_visual], 1).to(dtype)
    for start in range(0, int(columns[-1]) + 1, block):
        keys = slice(start, min(start + block, length))
        scores = (grouped @ key[:, keys].transpose(1, 2)).to(dtype) * scale
        unread = (torch.arange(keys.start, keys.stop, device=query.device) > last) | ~is_real[keys]
        scores = scores.masked_fill(unread, -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        sums = sums * (top - new_top).exp() + (scores - new_top).exp() @ kinds[keys]
        top = new_top
    shares = (sums / sums.sum(-1, keepdim=True)).view(heads, rows, 2)
    return shares[..., 0], shares[..., 1]


@contextmanager
def observed_attention(text_model: nn.Module, observer: Observer) -> Iterator[None]:
    """Within the block, `observer(module, query, key, scale)` sees every attention call of `text_model`.

    query (batch, heads, length, head_dim) and key (batch, kv_heads, length, head_dim) after rotation. The attention
    itself is SDPA. The model's own implementation is set back at the end.
    """
    AttentionInterface.register(OBSERVED, _attention)
    AttentionMaskInterface.register(OBSERVED, sdpa_mask)
    config = text_model.config
    own, token = config._attn_implementation, _observer.set(observer)
    config._attn_implementation = OBSERVED
    try:
        yield
    finally:
        config._attn_implementation = own
        _observer.reset(token)


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _observer.get()(module, query, key, scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
