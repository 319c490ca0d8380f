"""The Triton kernels as torch operators, with shapes for tracing, gradients, and the FLOPs of the pairs they walk.

What an operator does is a function of its own, `launch_...`: called itself it costs the host a tenth of the operator.
`runs` is causal attention over runs of slots, `near` a neighbourhood with the text before it. All take queries
(rows, heads, head_dim) and keys and values (batch, slots, kv_heads, head_dim) with the last dimension contiguous, and
return the output in the queries' shape and the log-sum-exp (rows, heads), float32, in base 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import triton_mass, triton_near, triton_runs, triton_steps, tuning
from .tuning import Blocks, width_block

_LOG2E = math.log2(math.e)
# Keys of a program that adds the parts of a gradient: few, so that many programs share the reading.
_JOINED_ROWS = 4


def launch_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    run_table: Tensor,
    blind: Tensor | None,
    gradient_blocks: Tensor | None,
    key_blocks: Tensor | None,
    scale: float,
    config: Sequence[int],
    split: Sequence[int],
    pairs: int,
) -> tuple[Tensor, Tensor]:
    """Tables: `tables.RunTables`. blind: (heads,) int8. gradient_blocks, key_blocks: blocks of queries and of keys
    for the gradients.

    config: `tuning.Blocks`. split: heads of a program, parts, slots a part. pairs: walked in one head.
    """
    rows, heads, head_dim = query.shape
    group = heads // key.shape[2]
    config, (packed, splits, slots_a_split) = Blocks(*config), split
    shape = (splits, rows, heads, head_dim)
    # not filled: the blocks cover every row
    out = query.new_empty(shape, dtype=query.dtype if splits == 1 else torch.float32)
    lse = query.new_empty(shape[:-1], dtype=torch.float32)
    if len(blocks):
        triton_runs.runs_forward[len(blocks), heads // packed, splits](
            query, key, value, out, lse, columns, blocks, offsets, run_table, blind,
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], rows, slots_a_split, scale * _LOG2E,
            GROUP=group, HEADS=packed, GROUP_BLOCK=triton.next_power_of_2(packed), HEAD_DIM=head_dim,
            BLOCK_D=width_block(head_dim), BLOCK_Q=config.queries, BLOCK_N=config.keys, HAS_BLIND=blind is not None,
            PRECISION=tuning.precision(query.element_size(), tuning.device_of(query)), **config.options,
        )  # fmt: skip
    return _joined(query, out, lse)


def _joined(query: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Of parts out (splits, rows, heads, head_dim) and lse (splits, rows, heads), the whole."""
    splits, rows, heads, head_dim = out.shape
    if splits == 1:
        return out[0], lse[0]
    joined, joined_lse = torch.empty_like(query, memory_format=torch.contiguous_format), torch.empty_like(lse[0])
    triton_runs.combine[(rows * heads,)](
        out, lse, joined, joined_lse, rows * heads,
        HEAD_DIM=head_dim, BLOCK_D=width_block(head_dim), SPLITS=splits, SPLITS_BLOCK=triton.next_power_of_2(splits),
    )  # fmt: skip
    return joined, joined_lse


runs = custom_op("vis_sparse::runs", mutates_args=())(launch_runs)


@runs.register_fake
def _(query, key, value, *args):
    return _like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@custom_op("vis_sparse::runs_backward", mutates_args=())
def runs_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    columns: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    run_table: Tensor,
    blind: Tensor | None,
    key_blocks: Tensor,
    scale: float,
    pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. `blocks` are of `tuning.query_gradient_blocks`' size."""
    grad_out, delta = _delta(grad_out, out)
    grads = _like(query), _like(key), _like(value)
    config = tuning.query_gradient_blocks(query.shape[2], query.element_size(), tuning.device_of(query))
    if len(blocks):
        triton_runs.runs_query_gradient[len(blocks), query.shape[1]](
            query, key, value, grad_out, lse, delta, grads[0], columns, blocks, offsets, run_table, blind,
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], scale, scale * _LOG2E,
            BLOCK_Q=config.queries, BLOCK_N=config.keys, HAS_BLIND=blind is not None, **_common(query, key, config),
        )  # fmt: skip
    _key_gradient_of_runs(query, key, value, grad_out, lse, delta, grads, columns, key_blocks, blind, scale)
    return grads


def _key_config(query: Tensor) -> Blocks:
    return tuning.key_gradient_blocks(query.shape[2], query.element_size(), tuning.device_of(query))


def _key_gradient_of_runs(query, key, value, grad_out, lse, delta, grads, columns, key_blocks, blind, scale):
    config, kv_heads, head_dim = _key_config(query), key.shape[2], query.shape[2]
    if not len(key_blocks):
        return
    programs = len(key_blocks) * kv_heads
    splits = tuning.key_gradient_splits(programs, len(query), config.queries, tuning.device_of(query))
    out = grads[1:]
    if splits > 1:
        shape = (splits, *key_blocks.shape[:1], kv_heads, config.keys, head_dim)
        out = [query.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    triton_runs.runs_key_gradient[len(key_blocks), kv_heads, splits](
        query, key, value, grad_out, lse, delta, *out, columns, key_blocks, blind,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], key.shape[1], scale, scale * _LOG2E,
        BLOCK_Q=config.queries, BLOCK_N=config.keys, HAS_BLIND=blind is not None, SPLIT=splits > 1,
        **_common(query, key, config),
    )  # fmt: skip
    if splits > 1:
        rows = min(_JOINED_ROWS, config.keys)
        triton_runs.join_key_gradients[len(key_blocks), kv_heads, config.keys // rows](
            *out, *grads[1:], key_blocks, key.shape[1], splits,
            HEAD_DIM=head_dim, BLOCK_D=width_block(head_dim), BLOCK_N=config.keys, ROWS=rows,
        )  # fmt: skip


def launch_near(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tensor,
    segments: Tensor,
    run_table: Tensor,
    columns: Tensor | None,
    key_blocks: Tensor | None,
    key_tiles: Tensor | None,
    scale: float,
    rule: Sequence[int],
    sides: Sequence[int],
    key_sides: Sequence[int],
    config: Sequence[int],
    pairs: int,
) -> tuple[Tensor, Tensor]:
    """Tables: `tables.NearTables`; columns, key_blocks and key_tiles (with key_sides) only for the gradients.

    rule: radius, frames, stride, causal. sides: of tiles and steps (`Tiling.sides`). config: `tuning.Blocks`.
    """
    config = Blocks(*config)
    out, lse = _like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    triton_near.near_forward[len(tiles), key.shape[2]](
        query, key, value, out, lse, tiles, segments, run_table,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], scale * _LOG2E,
        **box_constants(rule, sides), **_group(query, key), **_common(query, key, config),
    )  # fmt: skip
    return out, lse


near = custom_op("vis_sparse::near", mutates_args=())(launch_near)


@near.register_fake
def _(query, key, value, *args):
    return _like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@custom_op("vis_sparse::near_backward", mutates_args=())
def near_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    segments: Tensor,
    run_table: Tensor,
    columns: Tensor,
    key_blocks: Tensor,
    key_tiles: Tensor,
    scale: float,
    rule: Sequence[int],
    sides: Sequence[int],
    key_sides: Sequence[int],
    config: Sequence[int],
    pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grad_out, delta = _delta(grad_out, out)
    grads = _like(query), _like(key), _like(value)
    strides = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3])
    tile_config = tuning.near_gradient_blocks(Blocks(*config), query.shape[2], tuning.device_of(query))
    key_config = _key_config(query)
    triton_near.near_query_gradient[len(tiles), key.shape[2]](
        query, key, value, grad_out, lse, delta, grads[0], tiles, segments, run_table, *strides, scale, scale * _LOG2E,
        **box_constants(rule, sides), **_group(query, key), **_common(query, key, tile_config),
    )  # fmt: skip
    triton_near.near_key_gradient[len(key_tiles), key.shape[2]](
        query, key, value, grad_out, lse, delta, *grads[1:], key_tiles, segments, *strides, key.shape[1],
        scale, scale * _LOG2E, **box_constants(rule, key_sides), **_common(query, key, key_config),
    )  # fmt: skip
    _key_gradient_of_runs(query, key, value, grad_out, lse, delta, grads, columns, key_blocks, None, scale)
    return grads


@runs_backward.register_fake
def _(grad_out, query, key, value, *args):
    return _like(query), _like(key), _like(value)


@near_backward.register_fake
def _(grad_out, query, key, value, *args):
    return _like(query), _like(key), _like(value)


def launch_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor | None,
    last: Tensor | None,
    visual: Tensor | None,
    blind: Tensor | None,
    scale: float,
    config: Sequence[int],
    split: Sequence[int],
) -> Tensor:
    """Decode steps, one query row a sample. Tables: `triton_steps`. split: parts, slots a part. Without gradients."""
    (samples, heads, head_dim), (splits, slots_a_split), config = query.shape, split, Blocks(*config)
    slots, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    out = query.new_empty((splits, *query.shape), dtype=query.dtype if splits == 1 else torch.float32)
    lse = query.new_empty(out.shape[:-1], dtype=torch.float32)
    stride_read = 0 if read is None or len(read) == 1 else read.stride(0)
    triton_steps.steps_forward[samples, kv_heads, splits](
        query, key, value, out, lse, read, last, visual, blind,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], stride_read, slots, slots_a_split, scale * _LOG2E,
        GROUP=group, GROUP_BLOCK=max(triton.next_power_of_2(group), tuning.DECODE_ROWS), HEAD_DIM=head_dim,
        BLOCK_D=width_block(head_dim), BLOCK_N=config.keys, HAS_READ=read is not None, HAS_LAST=last is not None,
        HAS_BLIND=blind is not None, PRECISION=tuning.precision(query.element_size(), tuning.device_of(query)),
        **config.options,
    )  # fmt: skip
    return _joined(query, out, lse)[0]


steps = custom_op("vis_sparse::steps", mutates_args=())(launch_steps)


@steps.register_fake
def _(query, *args):
    return _like(query)


def launch_mass(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    run_table: Tensor,
    blind: Tensor | None,
    scale: float,
    config: Sequence[int],
    pairs: int,
) -> Tensor:
    """(rows, heads), float32: the share of the softmax on visual keys. Arguments as those of `runs`."""
    config = Blocks(*config)
    out = query.new_empty(query.shape[:2], dtype=torch.float32)
    if len(blocks):
        triton_mass.mass_forward[len(blocks), query.shape[1]](
            query, key, out, columns, blocks, offsets, run_table, blind,
            *query.stride()[:2], *key.stride()[:3], scale * _LOG2E,
            BLOCK_Q=config.queries, BLOCK_N=config.keys, HAS_BLIND=blind is not None, **_common(query, key, config),
        )  # fmt: skip
    return out


mass = custom_op("vis_sparse::mass", mutates_args=())(launch_mass)


@mass.register_fake
def _(query, *args):
    return query.new_empty(query.shape[:2], dtype=torch.float32)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _delta(grad_out: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out, contiguous, and the sum over the width of grad_out x out, (rows, heads) float32."""
    return grad_out.contiguous(), (grad_out.float() * out.float()).sum(-1)


def _common(query: Tensor, key: Tensor, config: Blocks) -> dict:
    head_dim = query.shape[2]
    return {
        "GROUP": query.shape[1] // key.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": width_block(head_dim),
        "PRECISION": tuning.precision(query.element_size(), tuning.device_of(query)),
    } | config.options


def _group(query: Tensor, key: Tensor) -> dict:
    return {"GROUP_BLOCK": triton.next_power_of_2(query.shape[1] // key.shape[2])}


def box_constants(rule: Sequence[int], sides: Sequence[int]) -> dict:
    """What the rule and the sides of tiles and steps are called in the kernels."""
    names = "RADIUS", "FRAMES", "STRIDE", "CAUSAL", "TILE_Y", "TILE_X", "STEP_Y", "STEP_X", "HAS_CORE"
    box = dict(zip(names, (*rule, *sides), strict=True))
    return box | {name: bool(box[name]) for name in ("CAUSAL", "HAS_CORE")}


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _saved(ctx) -> tuple[list, Tensor, Tensor]:
    """The inputs as they were, the output and its lse."""
    *tensors, out, lse = ctx.saved_tensors
    tensors = iter(tensors)
    inputs = [next(tensors) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others)]
    return inputs, out, lse


def _runs_gradient(ctx, grad_out, _):
    inputs, out, lse = _saved(ctx)
    query, key, value, columns, _, offsets, table, blind, blocks, key_blocks, scale, _, _, pairs = inputs
    grads = runs_backward(
        grad_out, query, key, value, out, lse, columns, blocks, offsets, table, blind, key_blocks, scale, pairs
    )
    return *grads, *[None] * (len(inputs) - 3)


def _near_gradient(ctx, grad_out, _):
    inputs, out, lse = _saved(ctx)
    grads = near_backward(grad_out, *inputs[:3], out, lse, *inputs[3:])
    return *grads, *[None] * (len(inputs) - 3)


runs.register_autograd(_runs_gradient, setup_context=_save)
near.register_autograd(_near_gradient, setup_context=_save)


# Two products a pair forward, five backward; each is 2 * head_dim FLOPs in every head.
@register_flop_formula([torch.ops.vis_sparse.runs, torch.ops.vis_sparse.near])
def _forward_flops(query, *args, out_shape=None, **kwargs) -> int:
    return 2 * 2 * args[-1] * query[1] * query[2]


@register_flop_formula([torch.ops.vis_sparse.runs_backward, torch.ops.vis_sparse.near_backward])
def _backward_flops(grad_out, *args, out_shape=None, **kwargs) -> int:
    return 5 * 2 * args[-1] * grad_out[1] * grad_out[2]


@register_flop_formula(torch.ops.vis_sparse.steps)
def _steps_flops(query, key, *args, out_shape=None, **kwargs) -> int:
    return 2 * 2 * query[0] * key[1] * query[1] * query[2]


@register_flop_formula(torch.ops.vis_sparse.mass)
def _mass_flops(query, *args, out_shape=None, **kwargs) -> int:
    return 2 * args[-1] * query[1] * query[2]
