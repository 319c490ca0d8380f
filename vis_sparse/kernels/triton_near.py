"""Triton kernels for neighbourhoods: a program owns a tile of a grid and reads the box of keys its windows cover.

The box is walked in small rectangles of keys (`triton_boxes.py`), those that the whole tile reads first, without a
mask. The text before the segment comes before them, in the same softmax, without a mask too. With grouped KV heads the
group's heads are rows of the tile: each key is read once for all of them, and the tile of positions (hence its halo)
can be small.
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
from .triton_boxes import (
    corner,
    entries,
    key_box,
    key_windows,
    place_of,
    query_box,
    query_windows,
    steps_of,
    within,
)
from .triton_runs import walk_forward, walk_query_gradient


@triton.jit
def load_segment(segments_ptr, segment):
    """Sample, first packed row, first slot, frames, height, width, and the range of the text runs."""
    base = segments_ptr + 8 * segment
    return (
        tl.load(base).to(tl.int64), tl.load(base + 1).to(tl.int64), tl.load(base + 2), tl.load(base + 3),
        tl.load(base + 4), tl.load(base + 5), tl.load(base + 6), tl.load(base + 7),
    )  # fmt: skip


@triton.jit
def load_tile(tiles_ptr):
    """Segment, frame, first row and first column of this program's tile."""
    base = tiles_ptr + 4 * tl.program_id(0)
    return tl.load(base), tl.load(base + 1), tl.load(base + 2), tl.load(base + 3)


@triton.jit
def box_scores(
    query, key_base, index, box, windows, q_t, q_place, first_slot, height, width, stride_ks, scale,
    CAUSAL: tl.constexpr, HAS_CORE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys of step `index` of the box, scores on them, their slots, and which of them exist (all, unless MASKED)."""
    steps, inner, full = box
    k_t, y, x = corner(index, steps, inner, full, STEP_Y, STEP_X, HAS_CORE, MASKED)
    offset, place, exists = entries(y, x, height, width, STEP_Y, STEP_X)
    slots = first_slot + k_t * height * width + offset
    key = load_rows(key_base, slots * stride_ks, exists, HEAD_DIM, BLOCK_D, not MASKED)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if MASKED:
        allowed = within(place[None, :], windows)
        if CAUSAL:
            allowed = allowed & ((place[None, :] <= q_place[:, None]) | (k_t < q_t))
        scores = tl.where(allowed, scores, NOTHING)
    return key, scores, slots, exists


@triton.jit
def walk_box_forward(
    query, acc, top, total, key_base, value_base, low, high, box, windows, q_t, q_place, first_slot, height, width,
    stride_ks, stride_vs, scale, CAUSAL: tl.constexpr, HAS_CORE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for index in range(low, high):
        _, scores, slots, exists = box_scores(
            query, key_base, index, box, windows, q_t, q_place, first_slot, height, width, stride_ks, scale,
            CAUSAL, HAS_CORE, HEAD_DIM, BLOCK_D, STEP_Y, STEP_X, PRECISION, MASKED,
        )  # fmt: skip
        value = load_rows(value_base, slots * stride_vs, exists, HEAD_DIM, BLOCK_D, not MASKED)
        acc, top, total = softmax_step(scores, value, acc, top, total, PRECISION)
    return acc, top, total


@triton.jit
def walk_box_query_gradient(
    query, acc, grad_out, lse, delta, key_base, value_base, low, high, box, windows, q_t, q_place, first_slot, height,
    width, stride_ks, stride_vs, scale, CAUSAL: tl.constexpr, HAS_CORE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for index in range(low, high):
        key, scores, slots, exists = box_scores(
            query, key_base, index, box, windows, q_t, q_place, first_slot, height, width, stride_ks, scale,
            CAUSAL, HAS_CORE, HEAD_DIM, BLOCK_D, STEP_Y, STEP_X, PRECISION, MASKED,
        )  # fmt: skip
        value = load_rows(value_base, slots * stride_vs, exists, HEAD_DIM, BLOCK_D, not MASKED)
        acc = query_gradient_step(scores, key, value, grad_out, lse, delta, acc, PRECISION)
    return acc


@triton.jit
def walk_box_key_gradient(
    key, value, grad_key, grad_value, q_base, grad_out_base, lse_ptr, delta_ptr, low, high, box, windows, k_t, k_place,
    first_row, height, width, stride_qm, num_heads, scale, CAUSAL: tl.constexpr, HAS_CORE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries of one head; the bases and pointers are at it."""
    steps, inner, full = box
    for index in range(low, high):
        q_t, y, x = corner(index, steps, inner, full, STEP_Y, STEP_X, HAS_CORE, MASKED)
        offset, place, exists = entries(y, x, height, width, STEP_Y, STEP_X)
        row = first_row + q_t * height * width + offset
        at = row * num_heads
        query = load_rows(q_base, row * stride_qm, exists, HEAD_DIM, BLOCK_D, not MASKED)
        grad_out = load_rows(grad_out_base, at * HEAD_DIM, exists, HEAD_DIM, BLOCK_D, not MASKED)
        lse, delta = load_statistics(lse_ptr, delta_ptr, at, exists)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
        if MASKED:
            allowed = within(place[None, :], windows)
            if CAUSAL:
                allowed = allowed & ((k_place[:, None] <= place[None, :]) | (k_t < q_t))
            scores = tl.where(allowed, scores, NOTHING)
        grad_key, grad_value = key_gradient_step(
            scores, query, value, grad_out, lse, delta, grad_key, grad_value, PRECISION
        )
    return grad_key, grad_value


@triton.jit
def near_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, segments_ptr, runs_ptr,
    stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, scale,
    RADIUS: tl.constexpr, FRAMES: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, HAS_CORE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (num_visual, heads, HEAD_DIM) and lse (num_visual, heads), in base 2.

    A program: a tile x the GROUP heads of a KV head. `scale` includes log2(e).
    """
    segment, t, y, x = load_tile(tiles_ptr)
    sample, first_row, first_slot, frames, height, width, run_low, run_high = load_segment(segments_ptr, segment)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    ROWS: tl.constexpr = TILE_Y * TILE_X * GROUP_BLOCK
    BLOCK_N: tl.constexpr = STEP_Y * STEP_X
    index = tl.arange(0, ROWS)
    member, place = index % GROUP_BLOCK, index // GROUP_BLOCK
    q_y, q_x = y + place // TILE_X, x + place % TILE_X
    head = kv_head * GROUP + member
    present = (q_y < height) & (q_x < width) & (member < GROUP)
    row = (t * height + q_y) * width + q_x
    query = load_rows(
        q_ptr + first_row * stride_qm, row * stride_qm + head * stride_qh, present, HEAD_DIM, BLOCK_D, False
    )
    key_base = k_ptr + sample * stride_kb + kv_head * stride_kh
    value_base = v_ptr + sample * stride_vb + kv_head * stride_vh

    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    top = tl.full([ROWS], NOTHING, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for run in range(run_low, run_high):
        low = tl.load(runs_ptr + 4 * run)
        high = low + tl.load(runs_ptr + 4 * run + 1)
        full = low + (high - low) // BLOCK_N * BLOCK_N
        acc, top, total = walk_forward(
            query, acc, top, total, key_base, value_base, low, full, stride_ks, stride_vs, q_y, 0, 0, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, False, False,
        )  # fmt: skip
        # shifted before every column: only the end of the run is masked
        acc, top, total = walk_forward(
            query, acc, top, total, key_base, value_base, full, high, stride_ks, stride_vs, q_y, -high, 0, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, True, False,
        )  # fmt: skip
    outer, core = key_box(t, y, x, frames, height, width, RADIUS, FRAMES, STRIDE, CAUSAL, TILE_Y, TILE_X)
    steps, inner, full, size = steps_of(outer, core, STEP_Y, STEP_X, HAS_CORE)
    box, q_place = (steps, inner, full), place_of(q_y, q_x)
    windows = key_windows(q_y[:, None], q_x[:, None], height, width, RADIUS, STRIDE)
    if HAS_CORE:
        acc, top, total = walk_box_forward(
            query, acc, top, total, key_base, value_base, 0, full, box, windows, t, q_place, first_slot, height, width,
            stride_ks, stride_vs, scale, CAUSAL, HAS_CORE, HEAD_DIM, BLOCK_D, STEP_Y, STEP_X, PRECISION, False,
        )  # fmt: skip
    acc, top, total = walk_box_forward(
        query, acc, top, total, key_base, value_base, full, size, box, windows, t, q_place, first_slot, height, width,
        stride_ks, stride_vs, scale, CAUSAL, HAS_CORE, HEAD_DIM, BLOCK_D, STEP_Y, STEP_X, PRECISION, True,
    )  # fmt: skip

    # a query reads at least itself, unless it lies outside the grid
    total = tl.where(present, total, 1.0)
    at = row * num_heads + head
    first = first_row * num_heads
    store_rows(out_ptr + first * HEAD_DIM, at * HEAD_DIM, acc / total[:, None], present, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + first + at, top + tl.log2(total), mask=present)


@triton.jit
def near_query_gradient(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, tiles_ptr, segments_ptr, runs_ptr,
    stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, scale, scale_log2,
    RADIUS: tl.constexpr, FRAMES: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, HAS_CORE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of queries: the walk of `near_forward` again. grad_out and grad_q: contiguous, as the output."""
    segment, t, y, x = load_tile(tiles_ptr)
    sample, first_row, first_slot, frames, height, width, run_low, run_high = load_segment(segments_ptr, segment)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    ROWS: tl.constexpr = TILE_Y * TILE_X * GROUP_BLOCK
    BLOCK_N: tl.constexpr = STEP_Y * STEP_X
    index = tl.arange(0, ROWS)
    member, place = index % GROUP_BLOCK, index // GROUP_BLOCK
    q_y, q_x = y + place // TILE_X, x + place % TILE_X
    head = kv_head * GROUP + member
    present = (q_y < height) & (q_x < width) & (member < GROUP)
    row = (t * height + q_y) * width + q_x
    query = load_rows(
        q_ptr + first_row * stride_qm, row * stride_qm + head * stride_qh, present, HEAD_DIM, BLOCK_D, False
    )
    at, first = row * num_heads + head, first_row * num_heads
    grad_out = load_rows(grad_out_ptr + first * HEAD_DIM, at * HEAD_DIM, present, HEAD_DIM, BLOCK_D, False)
    lse, delta = load_statistics(lse_ptr + first, delta_ptr + first, at, present)
    key_base = k_ptr + sample * stride_kb + kv_head * stride_kh
    value_base = v_ptr + sample * stride_vb + kv_head * stride_vh

    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for run in range(run_low, run_high):
        low = tl.load(runs_ptr + 4 * run)
        high = low + tl.load(runs_ptr + 4 * run + 1)
        full = low + (high - low) // BLOCK_N * BLOCK_N
        acc = walk_query_gradient(
            query, acc, grad_out, lse, delta, key_base, value_base, low, full, stride_ks, stride_vs, q_y, 0,
            scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, False,
        )  # fmt: skip
        acc = walk_query_gradient(
            query, acc, grad_out, lse, delta, key_base, value_base, full, high, stride_ks, stride_vs, q_y, -high,
            scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    outer, core = key_box(t, y, x, frames, height, width, RADIUS, FRAMES, STRIDE, CAUSAL, TILE_Y, TILE_X)
    steps, inner, full, size = steps_of(outer, core, STEP_Y, STEP_X, HAS_CORE)
    box, q_place = (steps, inner, full), place_of(q_y, q_x)
    windows = key_windows(q_y[:, None], q_x[:, None], height, width, RADIUS, STRIDE)
    if HAS_CORE:
        acc = walk_box_query_gradient(
            query, acc, grad_out, lse, delta, key_base, value_base, 0, full, box, windows, t, q_place, first_slot,
            height, width, stride_ks, stride_vs, scale_log2, CAUSAL, HAS_CORE, HEAD_DIM, BLOCK_D, STEP_Y, STEP_X,
            PRECISION, False,
        )  # fmt: skip
    acc = walk_box_query_gradient(
        query, acc, grad_out, lse, delta, key_base, value_base, full, size, box, windows, t, q_place, first_slot,
        height, width, stride_ks, stride_vs, scale_log2, CAUSAL, HAS_CORE, HEAD_DIM, BLOCK_D, STEP_Y, STEP_X,
        PRECISION, True,
    )  # fmt: skip
    store_rows(grad_q_ptr + first * HEAD_DIM, at * HEAD_DIM, acc * scale, present, HEAD_DIM, BLOCK_D)


@triton.jit
def near_key_gradient(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, tiles_ptr, segments_ptr,
    stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, slots, scale, scale_log2,
    RADIUS: tl.constexpr, FRAMES: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, HAS_CORE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of the segment's own keys and values, over the box of queries whose windows touch it.

    grad_k and grad_v: contiguous (batch, slots, kv_heads, HEAD_DIM). Those of text keys: `runs_key_gradient`.
    """
    segment, t, y, x = load_tile(tiles_ptr)
    sample, first_row, first_slot, frames, height, width, _, _ = load_segment(segments_ptr, segment)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    num_heads = kv_heads * GROUP
    place = tl.arange(0, TILE_Y * TILE_X)
    k_y, k_x = y + place // TILE_X, x + place % TILE_X
    present = (k_y < height) & (k_x < width)
    slot = first_slot + (t * height + k_y) * width + k_x
    key = load_rows(
        k_ptr + sample * stride_kb + kv_head * stride_kh, slot * stride_ks, present, HEAD_DIM, BLOCK_D, False
    )
    value = load_rows(
        v_ptr + sample * stride_vb + kv_head * stride_vh, slot * stride_vs, present, HEAD_DIM, BLOCK_D, False
    )
    outer, core = query_box(t, y, x, frames, height, width, RADIUS, FRAMES, STRIDE, CAUSAL, TILE_Y, TILE_X)
    steps, inner, full, size = steps_of(outer, core, STEP_Y, STEP_X, HAS_CORE)
    box, k_place = (steps, inner, full), place_of(k_y, k_x)
    windows = query_windows(k_y[:, None], k_x[:, None], height, width, RADIUS, STRIDE)
    grad_key = tl.zeros([TILE_Y * TILE_X, BLOCK_D], dtype=tl.float32)
    grad_value = tl.zeros([TILE_Y * TILE_X, BLOCK_D], dtype=tl.float32)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        q_base, grad_out_base = q_ptr + head * stride_qh, grad_out_ptr + head * HEAD_DIM
        if HAS_CORE:
            grad_key, grad_value = walk_box_key_gradient(
                key, value, grad_key, grad_value, q_base, grad_out_base, lse_ptr + head, delta_ptr + head, 0, full, box,
                windows, t, k_place, first_row, height, width, stride_qm, num_heads, scale_log2, CAUSAL, HAS_CORE,
                HEAD_DIM, BLOCK_D, STEP_Y, STEP_X, PRECISION, False,
            )  # fmt: skip
        grad_key, grad_value = walk_box_key_gradient(
            key, value, grad_key, grad_value, q_base, grad_out_base, lse_ptr + head, delta_ptr + head, full, size, box,
            windows, t, k_place, first_row, height, width, stride_qm, num_heads, scale_log2, CAUSAL, HAS_CORE,
            HEAD_DIM, BLOCK_D, STEP_Y, STEP_X, PRECISION, True,
        )  # fmt: skip
    at = ((sample * slots + slot) * kv_heads + kv_head) * HEAD_DIM
    store_rows(grad_k_ptr, at, grad_key * scale, present, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr, at, grad_value, present, HEAD_DIM, BLOCK_D)
