"""Static caches: decode steps that all have the same shapes and look at no value, so that one graph serves them all.

`generate(cache_implementation="static")` makes such a cache, and calls with masks of four dimensions; its prompt runs
as any other, and leaves lanes with room behind. `torch.compile` traces a step whole.
"""

from __future__ import annotations

import torch

from ..executor.lanes import LaneExecutor
from ..executor.transformers_internals import cache_layers, output_of
from .errors import PatchError

# What a compiler that wants one graph of a whole patched model is told.
AROUND_LANES = (
    "vis_sparse finds layouts and caches of a call on the host; use torch.compile(model) without fullgraph=True: what "
    "runs in lanes is compiled inside"
)


def columns_read(attention_mask) -> torch.Tensor | None:
    """(batch, columns): what the last query of each sample may read, of any mask that transformers makes; None if all.

    Masks by layer type hold the same for a window that is not full.
    """
    if isinstance(attention_mask, dict):
        kinds = [kind for kind in ("full_attention", "sliding_attention") if kind in attention_mask]
        attention_mask = attention_mask[kinds[0]] if kinds else None
    if attention_mask is None or attention_mask.dim() == 2:
        return attention_mask
    last = attention_mask[:, 0, -1]
    return last if last.dtype == torch.bool else last == 0


def check_causal(attention_mask, columns: torch.Tensor | None, past: int, length: int) -> torch.Tensor | None:
    """Of `columns_read` those that a prompt has, (batch, past + length), of a mask that is causal over them.

    Raises PatchError for another one.
    """
    if columns is None:
        return None
    columns = columns[:, : past + length]
    for mask in attention_mask.values() if isinstance(attention_mask, dict) else (attention_mask,):
        if mask is None or mask.dim() == 2:
            continue
        given = mask[:, 0, :, : past + length]
        given = given if given.dtype == torch.bool else given == 0
        order = torch.ones(length, past + length, dtype=torch.bool, device=given.device).tril(past)
        if mask.shape[1] != 1 or not torch.equal(given, order & columns[:, None]):
            raise PatchError(
                "attention_mask: got one of 4 dimensions that is not causal, expected 2 dimensions (batch, columns) of "
                "ones and zeros"
            )
    return columns


def step(text_model, executor: LaneExecutor, cache, inputs_embeds, mask, position_ids, wants_hidden: bool):
    """One decode step of the text model. mask: `columns_read`."""
    layers = cache_layers(cache)
    tables = executor.fixed_step(layers, mask)
    if position_ids is None:
        position_ids = cache.get_seq_length().view(1, 1)
    cos, sin = text_model.rotary_emb(inputs_embeds, position_ids=position_ids)
    collected = [] if wants_hidden else None
    hidden = executor.run(inputs_embeds, cos, sin, tables, layers, collected)
    hidden = text_model.norm(hidden)
    for layer in layers:
        if layer.leads:
            layer.book.fixed.advance()
    return output_of(hidden, cache, None if collected is None else (*collected, hidden))
