"""The `flex` backend: torch's FlexAttention, compiled, with block masks that are kept with their pattern.

On a CPU, FlexAttention has no gradients (it says so), and is compiled for 16 and 32 bits only: float64 runs through
its eager form, which is correct and slow. A decode step goes to the `torch` backend: its mask would cost more than its
attention.
"""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..layout.packing import Coordinates, on_device
from ..plans.layer_plan import Neighborhood
from . import tiled
from .patterns import TextPattern, VisualPattern, visible, window
from .tiled import attention_mass

__all__ = ["attention_mass", "text_attention", "visual_attention"]

_BLOCK = 128


def text_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: TextPattern, scale: float
) -> torch.Tensor:
    """As `reference.text_attention`."""
    if query.shape[1] <= 1:
        return tiled.text_attention(query, key, value, pattern, scale)
    rows = (t.transpose(1, 2) for t in (query, key, value))
    return _attention(*rows, pattern.derive(_text_blocks), scale).transpose(1, 2)


def visual_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: VisualPattern, scale: float
) -> torch.Tensor:
    """As `reference.visual_attention`: one sequence of all packed rows over all slots of the batch."""
    rows = (t.transpose(0, 1)[None] for t in (query, key.flatten(0, 1), value.flatten(0, 1)))
    return _attention(*rows, pattern.derive(_visual_blocks), scale)[0].transpose(0, 1)


def _attention(query, key, value, blocks: BlockMask, scale: float) -> torch.Tensor:
    settings = {"block_mask": blocks, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if query.device.type == "cpu" and query.dtype == torch.float64:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(query, key, value, **settings)
    return _compiled(query.device.type)(query, key, value, **settings)


@cache
def _compiled(device_type: str):
    # with dynamic shapes, the code that is made for CPUs may not compile
    return torch.compile(flex_attention, dynamic=False if device_type == "cpu" else None)


def _text_blocks(pattern: TextPattern) -> BlockMask:
    tables = (pattern.query_columns, pattern.slots.column, pattern.slots.valid, pattern.slots.is_visual)
    # copied, for they may be views that repeat one row
    query_column, column, valid, is_visual = (on_device(np.array(table), pattern.device) for table in tables)

    def reads(b, h, q, k):
        return valid[b, k] & (column[b, k] <= query_column[b, q])

    rule, heads = reads, None
    if pattern.blind is not None:
        blind = on_device(np.array(pattern.blind), pattern.device)
        heads = len(blind)

        def rule(b, h, q, k):
            return reads(b, h, q, k) & ~(blind[h] & is_visual[b, k])

    batch, slots = column.shape
    return create_block_mask(rule, batch, heads, query_column.shape[1], slots, pattern.device.type)


def _visual_blocks(pattern: VisualPattern) -> BlockMask:
    """Blocks of packed rows against blocks of slots, found block row by block row in the row's own samples."""
    key = Coordinates(*(array.ravel() for array in pattern.slots))
    slots = pattern.slots.sample.shape[1]
    columns = -(-len(key.sample) // _BLOCK)
    partial, full = [], []
    for start in range(0, len(pattern.query.sample), _BLOCK):
        query = pattern.query.take(np.s_[start : start + _BLOCK, None])
        first = query.sample.min() * slots // _BLOCK
        last = -(-(query.sample.max() + 1) * slots // _BLOCK)
        read = visible(pattern.attention, query, key.take(np.s_[first * _BLOCK : last * _BLOCK]))
        padded = np.zeros((len(read), (last - first) * _BLOCK), dtype=bool)
        padded[:, : read.shape[1]] = read
        counts = np.zeros(columns, dtype=int)
        counts[first:last] = padded.reshape(len(read), last - first, _BLOCK).sum((0, 2))
        is_full = counts == _BLOCK * _BLOCK
        full.append(is_full)
        partial.append((counts > 0) & ~is_full)
    tables = [table for found in (partial, full) for table in _listed(np.stack(found), pattern.device)]
    lengths = (len(pattern.query.sample), len(key.sample))
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=_BLOCK, mask_mod=_rule(pattern, key), seq_lengths=lengths)


def _listed(chosen: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 1, rows) how many blocks are chosen, and (1, 1, rows, columns) which, the chosen ones first."""
    order = np.argsort(~chosen, axis=1, kind="stable")
    return tuple(on_device(table.astype(np.int32)[None, None], device) for table in (chosen.sum(1), order))


def _rule(pattern: VisualPattern, key: Coordinates):
    """`patterns.visible` for two indices, on the device."""
    query, near, device = pattern.query, pattern.attention, pattern.device
    q_sample, q_segment, q_frame, q_column = (
        on_device(t, device) for t in (query.sample, query.segment, query.frame, query.column)
    )
    k_sample, k_segment, k_frame, k_column, k_y, k_x, valid, is_visual = (
        on_device(t, device)
        for t in (key.sample, key.segment, key.frame, key.column, key.y, key.x, key.valid, key.is_visual)
    )

    def before(b, h, q, k):
        return valid[k] & (k_sample[k] == q_sample[q]) & (k_column[k] <= q_column[q])

    if not isinstance(near, Neighborhood):
        return before
    (low_y, high_y), (low_x, high_x) = (
        (on_device(edge, device) for edge in window(near, position, side))
        for position, side in ((query.y, query.height), (query.x, query.width))
    )

    def reads(b, h, q, k):
        inside = (k_segment[k] == q_segment[q]) & ((k_frame[k] - q_frame[q]).abs() <= near.frames)
        inside = inside & (k_y[k] >= low_y[q]) & (k_y[k] <= high_y[q]) & (k_x[k] >= low_x[q]) & (k_x[k] <= high_x[q])
        if near.direction == "causal":
            inside = inside & (k_column[k] <= q_column[q])
        text = ~is_visual[k] & (k_sample[k] == q_sample[q]) & (k_column[k] <= q_column[q])
        return valid[k] & (inside | text)

    return reads
