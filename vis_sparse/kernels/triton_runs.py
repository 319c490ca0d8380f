"""Triton kernels for causal attention over runs of slots: text queries, and visual ones under "full".

A program owns a block of queries of one sample, in one query head or in all heads of a KV head (decode: the group's
heads are the rows of its block, so that each key is read once). It walks the sample's runs; blocks of keys that lie
before its first query need no mask. For decode the slots are split over programs, and `combine` joins their parts.
"""

from __future__ import annotations

import triton
from triton import language as tl

from .triton_blocks import (
    NOTHING,
    key_gradient_step,
    load_rows,
    load_statistics,
    query_gradient_step,
    softmax_step,
    store_rows,
)


@triton.jit
def run_bounds(runs_ptr, run, first_column, last_column, low_slot, high_slot, BLOCK_N: tl.constexpr):
    """Of a run: the slots [low, full) that every query of a block reads, in whole blocks, and [full, high) that some
    read; the constant between slot and column; whether its tokens are visual."""
    slot = tl.load(runs_ptr + 4 * run)
    length = tl.load(runs_ptr + 4 * run + 1)
    column = tl.load(runs_ptr + 4 * run + 2)
    is_visual = tl.load(runs_ptr + 4 * run + 3)
    low = tl.maximum(slot, low_slot)
    high = tl.minimum(slot + tl.minimum(length, last_column - column + 1), high_slot)
    full = tl.minimum(slot + tl.minimum(length, first_column - column + 1), high_slot)
    full = low + tl.maximum(full - low, 0) // BLOCK_N * BLOCK_N
    return low, full, high, column - slot, is_visual


@triton.jit
def block_scores(
    query, key_base, slots, high, stride_ks, column, shift, blind, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    BLIND_ROWS: tl.constexpr,
):  # fmt: skip
    """Keys of a block and the scores of queries on them."""
    key = load_rows(key_base, slots * stride_ks, slots < high, HEAD_DIM, BLOCK_D, not MASKED)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if MASKED:
        allowed = (slots + shift)[None, :] <= column[:, None]
        allowed = allowed & (slots < high)[None, :]
        if BLIND_ROWS:
            allowed = allowed & (blind == 0)[:, None]
        scores = tl.where(allowed, scores, NOTHING)
    return key, scores


@triton.jit
def walk_forward(
    query, acc, top, total, key_base, value_base, low, high, stride_ks, stride_vs, column, shift, blind, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, BLIND_ROWS: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        key, scores = block_scores(
            query, key_base, slots, high, stride_ks, column, shift, blind, scale,
            HEAD_DIM, BLOCK_D, PRECISION, MASKED, BLIND_ROWS,
        )  # fmt: skip
        value = load_rows(value_base, slots * stride_vs, slots < high, HEAD_DIM, BLOCK_D, not MASKED)
        acc, top, total = softmax_step(scores, value, acc, top, total, PRECISION)
    return acc, top, total


@triton.jit
def walk_query_gradient(
    query, acc, grad_out, lse, delta, key_base, value_base, low, high, stride_ks, stride_vs, column, shift, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        key, scores = block_scores(
            query, key_base, slots, high, stride_ks, column, shift, 0, scale,
            HEAD_DIM, BLOCK_D, PRECISION, MASKED, False,
        )  # fmt: skip
        value = load_rows(value_base, slots * stride_vs, slots < high, HEAD_DIM, BLOCK_D, not MASKED)
        acc = query_gradient_step(scores, key, value, grad_out, lse, delta, acc, PRECISION)
    return acc


@triton.jit
def runs_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, columns_ptr, blocks_ptr, offsets_ptr, runs_ptr, blind_ptr,
    stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, rows, slots_a_split, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BLIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (splits, rows, heads, HEAD_DIM) and lse (splits, rows, heads), in base 2.

    A program's rows are BLOCK_Q queries x HEADS heads (GROUP_BLOCK is the power of two above); `scale` includes
    log2(e).
    """
    block, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sample = tl.load(blocks_ptr + 5 * block)
    first_row = tl.load(blocks_ptr + 5 * block + 1).to(tl.int64)
    count = tl.load(blocks_ptr + 5 * block + 2)
    first_column = tl.load(blocks_ptr + 5 * block + 3)
    last_column = tl.load(blocks_ptr + 5 * block + 4)
    index = tl.arange(0, BLOCK_Q * GROUP_BLOCK)
    row, member = index // GROUP_BLOCK, index % GROUP_BLOCK
    head = part * HEADS + member
    num_heads = tl.num_programs(1) * HEADS
    present = (row < count) & (member < HEADS)
    column = tl.load(columns_ptr + first_row + row, mask=row < count, other=-1)
    query = load_rows(
        q_ptr + first_row * stride_qm, row * stride_qm + head * stride_qh, present, HEAD_DIM, BLOCK_D, False
    )
    blind = 0
    if HAS_BLIND:
        blind = tl.load(blind_ptr + head, mask=present, other=0)
    kv_head = part * HEADS // GROUP
    key_base = k_ptr + sample.to(tl.int64) * stride_kb + kv_head * stride_kh
    value_base = v_ptr + sample.to(tl.int64) * stride_vb + kv_head * stride_vh
    low_slot = split * slots_a_split
    high_slot = low_slot + slots_a_split

    acc = tl.zeros([BLOCK_Q * GROUP_BLOCK, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_Q * GROUP_BLOCK], NOTHING, dtype=tl.float32)
    total = tl.zeros([BLOCK_Q * GROUP_BLOCK], dtype=tl.float32)
    for run in range(tl.load(offsets_ptr + sample), tl.load(offsets_ptr + sample + 1)):
        low, full, high, shift, is_visual = run_bounds(
            runs_ptr, run, first_column, last_column, low_slot, high_slot, BLOCK_N
        )
        if HAS_BLIND:
            if HEADS == 1:
                high = tl.where(is_visual * tl.max(blind, 0) > 0, low, high)
                full = tl.minimum(full, high)
            else:
                full = tl.where(is_visual > 0, low, full)
        acc, top, total = walk_forward(
            query, acc, top, total, key_base, value_base, low, full, stride_ks, stride_vs, column, shift, blind, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, False, False,
        )  # fmt: skip
        acc, top, total = walk_forward(
            query, acc, top, total, key_base, value_base, full, high, stride_ks, stride_vs, column, shift,
            blind * is_visual, scale, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, True, HAS_BLIND and HEADS > 1,
        )  # fmt: skip

    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    first = split.to(tl.int64) * rows + first_row
    at = row * num_heads + head
    store_rows(out_ptr + first * num_heads * HEAD_DIM, at * HEAD_DIM, acc, present, HEAD_DIM, BLOCK_D)
    lse = tl.where(nothing, NOTHING, top + tl.log2(tl.where(nothing, 1.0, total)))
    tl.store(lse_ptr + first * num_heads + at, lse, mask=present)


@triton.jit
def combine(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, lines,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the parts of a split forward: out (lines, HEAD_DIM) and lse (lines,), lines = rows x heads."""
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_BLOCK)
    lse = tl.load(part_lse_ptr + split * lines + line, mask=split < SPLITS, other=NOTHING)
    top = tl.max(lse, 0)
    top = tl.where(top == NOTHING, 0.0, top)
    weights = tl.exp2(lse - top)
    total = tl.sum(weights, 0)
    parts = load_rows(
        parts_ptr + line * HEAD_DIM, split.to(tl.int64) * lines * HEAD_DIM, split < SPLITS, HEAD_DIM, BLOCK_D, False
    )
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    columns = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + line * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)
    tl.store(lse_ptr + line, tl.where(total == 0.0, NOTHING, top + tl.log2(tl.where(total == 0.0, 1.0, total))))


@triton.jit
def runs_query_gradient(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, columns_ptr, blocks_ptr, offsets_ptr, runs_ptr,
    blind_ptr, stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    scale, scale_log2, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BLIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of queries, one head a program. grad_out and grad_q are contiguous (rows, heads, HEAD_DIM)."""
    block, head = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1)
    sample = tl.load(blocks_ptr + 5 * block)
    first_row = tl.load(blocks_ptr + 5 * block + 1).to(tl.int64)
    count = tl.load(blocks_ptr + 5 * block + 2)
    first_column = tl.load(blocks_ptr + 5 * block + 3)
    last_column = tl.load(blocks_ptr + 5 * block + 4)
    row = tl.arange(0, BLOCK_Q)
    present = row < count
    column = tl.load(columns_ptr + first_row + row, mask=present, other=-1)
    query = load_rows(
        q_ptr + first_row * stride_qm + head * stride_qh, row * stride_qm, present, HEAD_DIM, BLOCK_D, False
    )
    first = first_row * num_heads + head
    at = row * num_heads
    grad_out = load_rows(grad_out_ptr + first * HEAD_DIM, at * HEAD_DIM, present, HEAD_DIM, BLOCK_D, False)
    lse, delta = load_statistics(lse_ptr + first, delta_ptr + first, at, present)
    key_base = k_ptr + sample.to(tl.int64) * stride_kb + head // GROUP * stride_kh
    value_base = v_ptr + sample.to(tl.int64) * stride_vb + head // GROUP * stride_vh
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    for run in range(tl.load(offsets_ptr + sample), tl.load(offsets_ptr + sample + 1)):
        low, full, high, shift, is_visual = run_bounds(runs_ptr, run, first_column, last_column, 0, 2147483647, BLOCK_N)
        if HAS_BLIND:
            high = tl.where(is_visual * tl.load(blind_ptr + head) > 0, low, high)
            full = tl.minimum(full, high)
        acc = walk_query_gradient(
            query, acc, grad_out, lse, delta, key_base, value_base, low, full, stride_ks, stride_vs, column, shift,
            scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, False,
        )  # fmt: skip
        acc = walk_query_gradient(
            query, acc, grad_out, lse, delta, key_base, value_base, full, high, stride_ks, stride_vs, column, shift,
            scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    store_rows(grad_q_ptr + first * HEAD_DIM, at * HEAD_DIM, acc * scale, present, HEAD_DIM, BLOCK_D)


@triton.jit
def runs_key_gradient(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, columns_ptr, blocks_ptr, blind_ptr,
    stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, slots, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BLIND: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, over the queries behind it in all heads of the group.

    grad_k and grad_v are contiguous (batch, slots, kv_heads, HEAD_DIM). SPLIT: the queries are split over the
    grid's third axis; each program writes its sums, float32 (splits, blocks, kv_heads, BLOCK_N, HEAD_DIM), and
    `join_key_gradients` adds them.
    """
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    sample = tl.load(blocks_ptr + 7 * block).to(tl.int64)
    first_slot = tl.load(blocks_ptr + 7 * block + 1)
    count = tl.load(blocks_ptr + 7 * block + 2)
    first_column = tl.load(blocks_ptr + 7 * block + 3)
    is_visual = tl.load(blocks_ptr + 7 * block + 4)
    low, high = tl.load(blocks_ptr + 7 * block + 5), tl.load(blocks_ptr + 7 * block + 6)
    if SPLIT:
        rows_a_split = tl.cdiv(tl.cdiv(high - low, tl.num_programs(2)), BLOCK_Q) * BLOCK_Q
        low = tl.minimum(low + split * rows_a_split, high)
        high = tl.minimum(low + rows_a_split, high)
    index = tl.arange(0, BLOCK_N)
    present = index < count
    slot = first_slot + index
    key_base = k_ptr + sample * stride_kb + kv_head * stride_kh
    value_base = v_ptr + sample * stride_vb + kv_head * stride_vh
    key = load_rows(key_base, slot * stride_ks, present, HEAD_DIM, BLOCK_D, False)
    value = load_rows(value_base, slot * stride_vs, present, HEAD_DIM, BLOCK_D, False)
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    num_heads = kv_heads * GROUP
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        end = high
        if HAS_BLIND:
            end = tl.where(is_visual * tl.load(blind_ptr + head) > 0, low, high)
        for start in range(low, end, BLOCK_Q):
            row = start + tl.arange(0, BLOCK_Q)
            exists = row < end
            column = tl.load(columns_ptr + row, mask=exists, other=-1)
            query = load_rows(q_ptr + head * stride_qh, row.to(tl.int64) * stride_qm, exists, HEAD_DIM, BLOCK_D, False)
            at = row.to(tl.int64) * num_heads + head
            grad_out = load_rows(grad_out_ptr, at * HEAD_DIM, exists, HEAD_DIM, BLOCK_D, False)
            lse, delta = load_statistics(lse_ptr, delta_ptr, at, exists)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale_log2
            allowed = (first_column + index)[:, None] <= column[None, :]
            scores = tl.where(allowed & present[:, None], scores, NOTHING)
            grad_key, grad_value = key_gradient_step(
                scores, query, value, grad_out, lse, delta, grad_key, grad_value, PRECISION
            )
    if SPLIT:
        part = (split.to(tl.int64) * tl.num_programs(0) + block) * kv_heads + kv_head
        first, at = part * BLOCK_N, index * HEAD_DIM
    else:
        first, at = (sample * slots + first_slot) * kv_heads + kv_head, index * kv_heads * HEAD_DIM
    store_rows(grad_k_ptr + first * HEAD_DIM, at, grad_key * scale, present, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr + first * HEAD_DIM, at, grad_value, present, HEAD_DIM, BLOCK_D)


@triton.jit
def join_key_gradients(
    part_k_ptr, part_v_ptr, grad_k_ptr, grad_v_ptr, blocks_ptr, slots, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the parts of `runs_key_gradient`, always in the same order. A program: ROWS keys of a block, one KV head."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    blocks, kv_heads = tl.num_programs(0), tl.num_programs(1)
    sample = tl.load(blocks_ptr + 7 * block).to(tl.int64)
    first_slot = tl.load(blocks_ptr + 7 * block + 1)
    index = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    present = index < tl.load(blocks_ptr + 7 * block + 2)
    part = (block.to(tl.int64) * kv_heads + kv_head) * BLOCK_N * HEAD_DIM
    step = blocks.to(tl.int64) * kv_heads * BLOCK_N * HEAD_DIM
    grad_key = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    grad_value = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for _ in range(0, splits):
        grad_key += load_rows(part_k_ptr + part, index * HEAD_DIM, present, HEAD_DIM, BLOCK_D, False)
        grad_value += load_rows(part_v_ptr + part, index * HEAD_DIM, present, HEAD_DIM, BLOCK_D, False)
        part += step
    first = (sample * slots + first_slot) * kv_heads + kv_head
    at = index * kv_heads * HEAD_DIM
    store_rows(grad_k_ptr + first * HEAD_DIM, at, grad_key, present, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr + first * HEAD_DIM, at, grad_value, present, HEAD_DIM, BLOCK_D)
