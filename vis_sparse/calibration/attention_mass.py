"""Where the attention of a few rows goes, without an attention matrix: sums over blocks of keys.

A temporary attention function, registered with transformers, sees queries and keys on their way to SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from einops import rearrange, repeat
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

REPLACED = "vis_sparse_replaced"
_BLOCK = 1024  # keys at a time

_function: ContextVar[Callable] = ContextVar("vis_sparse_attention")


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
    kv_heads, length, _ = key.shape
    group, rows = len(query) // kv_heads, len(columns)
    grouped = rearrange(query, "(kv group) row dim -> kv (group row) dim", kv=kv_heads)
    dtype = torch.promote_types(query.dtype, torch.float32)
    last = repeat(columns, "row -> (group row) 1", group=group)
    top = torch.full((*grouped.shape[:2], 1), torch.finfo(dtype).min, dtype=dtype, device=query.device)
    sums = torch.zeros((*grouped.shape[:2], 2), dtype=dtype, device=query.device)
    kinds = torch.stack([is_visual, ~is_visual], 1).to(dtype)
    for start in range(0, int(columns[-1]) + 1, block):
        keys = slice(start, min(start + block, length))
        scores = (grouped @ rearrange(key[:, keys], "kv key dim -> kv dim key")).to(dtype) * scale
        unread = (torch.arange(keys.start, keys.stop, device=query.device) > last) | ~is_real[keys]
        scores = scores.masked_fill(unread, -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        sums = sums * (top - new_top).exp() + (scores - new_top).exp() @ kinds[keys]
        top = new_top
    shares = sums / sums.sum(-1, keepdim=True)
    visual, others = rearrange(shares, "kv (group row) kind -> kind (kv group) row", row=rows)
    return visual, others


@contextmanager
def replaced_attention(text_model: nn.Module, function: Callable) -> Iterator[None]:
    """Within the block, `text_model` computes attention by `function`, one in transformers' convention.

    The model's own implementation is set back at the end.
    """
    AttentionInterface.register(REPLACED, _attention)
    AttentionMaskInterface.register(REPLACED, sdpa_mask)
    config = text_model.config
    own, token = config._attn_implementation, _function.set(function)
    config._attn_implementation = REPLACED
    try:
        yield
    finally:
        config._attn_implementation = own
        _function.reset(token)


def _attention(module, *args, **kwargs):
    return _function.get()(module, *args, **kwargs)
