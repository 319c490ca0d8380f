"""The `triton` backend: own kernels for CUDA and ROCm, forward and backward (docs/kernels.md)."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..layout.packing import on_device
from ..plans.layer_plan import Neighborhood
from . import tiled, triton_ops, tuning
from .patterns import StepPattern, TextPattern, VisualPattern
from .tables import key_blocks, key_tiles, near_tables, run_tables
from .triton_boxes import MOST_SIDE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 256


def can_run(query: torch.Tensor) -> bool:
    """Whether the kernels take this dtype and head width."""
    return query.dtype in DTYPES and query.shape[-1] <= _WIDEST


def text_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: TextPattern, scale: float
) -> torch.Tensor:
    """As `reference.text_attention`."""
    if isinstance(pattern, StepPattern):
        if _wants_gradients(query, key, value):
            return tiled.text_attention(query, key, value, pattern, scale)
        return _step(query[:, 0], key, value, pattern, scale)[:, None]
    out = _runs(query.flatten(0, 1), key, value, pattern, scale, pattern.derive(_blind), query.shape[1])
    return out.unflatten(0, query.shape[:2])


def visual_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: VisualPattern, scale: float
) -> torch.Tensor:
    """As `reference.visual_attention`."""
    if not isinstance(pattern.attention, Neighborhood):
        return _runs(query, key, value, pattern, scale, None, query.shape[0])
    if not pattern.derive(_has_places):
        return tiled.visual_attention(query, key, value, pattern, scale)
    query, key, value = _checked(query, key, value)
    (_, heads, head_dim), kv_heads = query.shape, key.shape[2]
    size, near = query.element_size(), pattern.attention
    programs = -(-query.shape[0] // 64) * kv_heads
    config = tuning.near_blocks(head_dim, size, heads // kv_heads, programs, tuning.device_of(query))
    tables = pattern.derive(near_tables, config.queries, config.keys)
    columns = blocks = tiles = None
    sides = (1,) * 5
    if _wants_gradients(query, key, value):
        block = tuning.key_gradient_blocks(head_dim, size, tuning.device_of(query))
        columns, blocks = pattern.derive(_query_columns), pattern.derive(key_blocks, block.keys)
        tiles, sides = pattern.derive(key_tiles, block.keys, block.queries)
    frames = min(near.frames, pattern.derive(_last_frame))
    rule = (near.radius, frames, near.stride, int(near.direction == "causal"))
    near_attention = triton_ops.near if _needs_operator(query, key, value) else triton_ops.launch_near
    out, _ = near_attention(
        query, key, value, tables.tiles, tables.segments, tables.runs, columns, blocks, tiles, scale, rule,
        tables.sides, sides, [*config], tables.pairs,
    )  # fmt: skip
    return out


def attention_mass(query: torch.Tensor, key: torch.Tensor, pattern: TextPattern, scale: float) -> torch.Tensor:
    """As `reference.attention_mass`."""
    rows, key = _checked(query.flatten(0, 1), key)
    config = tuning.run_blocks(rows.shape[2], rows.element_size(), tuning.device_of(rows))
    tables = pattern.unblind.derive(run_tables, config.queries)
    share = triton_ops.mass if _needs_operator(query, key) else triton_ops.launch_mass
    mass = share(
        rows, key, tables.columns, tables.blocks, tables.offsets, tables.runs, pattern.derive(_blind), scale, [*config],
        tables.pairs,
    )  # fmt: skip
    return mass.unflatten(0, query.shape[:2])


def _runs(query, key, value, pattern, scale: float, blind, queries: int) -> torch.Tensor:
    """Causal attention of rows over the pattern's slots; `queries`: rows of a sample."""
    query, key, value = _checked(query, key, value)
    (_, heads, head_dim), (samples, slots, kv_heads, _) = query.shape, key.shape
    size, device, group = query.element_size(), tuning.device_of(query), heads // kv_heads
    packed, splits = 1, 1
    config = tuning.run_blocks(head_dim, size, device)
    if tuning.is_decode(queries, group):
        packed, config = group, tuning.decode_blocks(head_dim, size, group, device)
        splits = tuning.decode_splits(samples * kv_heads, slots, device)
    # whole blocks of keys, so that a part begins where a block does
    slots_a_split = -(-slots // (splits * config.keys)) * config.keys
    shared = pattern.unblind if isinstance(pattern, TextPattern) else pattern
    tables = shared.derive(run_tables, config.queries)
    query_blocks = blocks = None
    if _wants_gradients(query, key, value):
        query_blocks = shared.derive(run_tables, tuning.query_gradient_blocks(head_dim, size, device).queries).blocks
        blocks = shared.derive(key_blocks, tuning.key_gradient_blocks(head_dim, size, device).keys)
    attention = triton_ops.runs if _needs_operator(query, key, value) else triton_ops.launch_runs
    out, _ = attention(
        query, key, value, tables.columns, tables.blocks, tables.offsets, tables.runs, blind, query_blocks, blocks,
        scale, [*config], (packed, splits, slots_a_split), tables.pairs,
    )  # fmt: skip
    return out


def _step(query, key, value, pattern: StepPattern, scale: float) -> torch.Tensor:
    """The rows of a decode step, (samples, heads, head_dim)."""
    query, key, value = _checked(query, key, value)
    (_, heads, head_dim), (samples, slots, kv_heads, _) = query.shape, key.shape
    device = tuning.device_of(query)
    config = tuning.decode_blocks(head_dim, query.element_size(), heads // kv_heads, device)
    splits = tuning.decode_splits(samples * kv_heads, slots, device)
    slots_a_split = -(-slots // (splits * config.keys)) * config.keys
    read = None if pattern.read is None else _bytes(pattern.read.allowed[:, 0, 0])
    blind = (None, None) if pattern.blind is None else (_bytes(pattern.blind.is_visual), _bytes(pattern.blind.heads))
    attention = triton_ops.steps if _needs_operator(query, key, value) else triton_ops.launch_steps
    return attention(query, key, value, read, pattern.last, *blind, scale, [*config], (splits, slots_a_split))


def _bytes(table: torch.Tensor) -> torch.Tensor:
    return table.view(torch.uint8)


def _needs_operator(*tensors: torch.Tensor) -> bool:
    """Whether somebody compiles the call, counts in it or records its gradients."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or _wants_gradients(*tensors)


def _checked(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows that lie one element after the other, as the kernels read them. ValueError for what they don't take."""
    if not can_run(tensors[0]):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"backend triton: got {tensors[0].dtype} and head width {tensors[0].shape[-1]}, expected one of {names} "
            f"and at most {_WIDEST}"
        )
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _wants_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _blind(pattern: TextPattern) -> torch.Tensor | None:
    return None if pattern.blind is None else on_device(np.array(pattern.blind, dtype=np.int8), pattern.device)


def _query_columns(pattern: VisualPattern) -> torch.Tensor:
    return on_device(pattern.query.column.astype(np.int32), pattern.device)


def _last_frame(pattern: VisualPattern) -> int:
    """Of the longest segment; 0 for images."""
    return int(pattern.query.frame.max(initial=0))


def _has_places(pattern: VisualPattern) -> bool:
    """Whether the kernels can find neighbours by place in the grid: no holes, and no side too long for half a word."""
    query = pattern.query
    return pattern.has_whole_grids and max(query.height.max(initial=0), query.width.max(initial=0)) < MOST_SIDE
