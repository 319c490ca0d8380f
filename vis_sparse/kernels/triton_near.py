"""Triton kernels for neighbourhoods: a program owns a tile of a grid and reads the box of keys its windows cover.

The box is walked as one list of BLOCK_N keys at a time, rows one after the other: key j of the box lies at row
j // width, column j % width, so that a halo of any size wastes less than one block, and every address is arithmetic.
The text before the segment comes first, in the same softmax, without a mask. With grouped KV heads the group's heads
are rows of the tile: each key is read once for all of them, and the tile of positions (hence its halo) can be small.
"""

from __future__ import annotations

import triton
from triton import language as tl

from .triton_blocks import (
    NOTHING,
    PRECISION,
    in_window,
    key_gradient_step,
    keys_of,
    load_rows,
    load_statistics,
    queries_of,
    query_gradient_step,
    softmax_step,
    store_rows,
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
def key_box(
    t, y, x, frames, height, width, RADIUS: tl.constexpr, FRAMES: tl.constexpr, STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """First frame, row and column of the keys that a tile of queries reads, and the numbers of frames, rows and
    columns."""
    y_end, x_end = tl.minimum(y + TILE_Y, height) - 1, tl.minimum(x + TILE_X, width) - 1
    top, bottom = keys_of(y, y_end, height, RADIUS, STRIDE)
    left, right = keys_of(x, x_end, width, RADIUS, STRIDE)
    first, last = tl.maximum(t - FRAMES, 0), tl.minimum(t + FRAMES, frames - 1)
    if CAUSAL:
        last = t
        if FRAMES == 0:
            bottom = y_end
    return first, top, left, last - first + 1, bottom - top + 1, right - left + 1


@triton.jit
def box_positions(index, t, y, x, rows, columns):
    """Coordinates of the entries `index` of a box that begins at (t, y, x)."""
    area = rows * columns
    inside = index % area
    return t + index // area, y + inside // columns, x + inside % columns


@triton.jit
def allowed_keys(
    q_t, q_y, q_x, k_t, k_y, k_x, height, width, RADIUS: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    """The rule of a neighbourhood for coordinates that broadcast; frames are exact by the box."""
    allowed = in_window(q_y, k_y, RADIUS, STRIDE) & in_window(q_x, k_x, RADIUS, STRIDE)
    if CAUSAL:
        allowed = allowed & ((k_t * height + k_y) * width + k_x <= (q_t * height + q_y) * width + q_x)
    return allowed


@triton.jit
def box_scores(
    query, key_base, start, total, box_t, box_y, box_x, rows, columns, q_t, q_y, q_x, first_slot, height, width,
    stride_ks, scale, RADIUS: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys of a block of the box, scores on them, their slots, and which of them exist."""
    index = start + tl.arange(0, BLOCK_N)
    exists = index < total
    k_t, k_y, k_x = box_positions(index, box_t, box_y, box_x, rows, columns)
    slots = first_slot + (k_t * height + k_y) * width + k_x
    key = load_rows(key_base, slots * stride_ks, exists, HEAD_DIM, BLOCK_D, False)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    allowed = exists[None, :]
    if not ALIGNED:
        allowed = allowed & allowed_keys(
            q_t, q_y[:, None], q_x[:, None], k_t[None, :], k_y[None, :], k_x[None, :], height, width,
            RADIUS, STRIDE, CAUSAL,
        )  # fmt: skip
    return key, tl.where(allowed, scores, NOTHING), slots, exists


@triton.jit
def near_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, segments_ptr, runs_ptr,
    stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, scale,
    RADIUS: tl.constexpr, FRAMES: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (num_visual, heads, HEAD_DIM) and lse (num_visual, heads), in base 2.

    A program: a tile x the GROUP heads of a KV head. `scale` includes log2(e). ALIGNED: all queries of a tile share
    one window and read all of it, so that nothing but the end of the box is masked.
    """
    segment, t, y, x = load_tile(tiles_ptr)
    sample, first_row, first_slot, frames, height, width, run_low, run_high = load_segment(segments_ptr, segment)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    ROWS: tl.constexpr = TILE_Y * TILE_X * GROUP_BLOCK
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
            HEAD_DIM, BLOCK_D, BLOCK_N, False, False,
        )  # fmt: skip
        # shifted before every column: only the end of the run is masked
        acc, top, total = walk_forward(
            query, acc, top, total, key_base, value_base, full, high, stride_ks, stride_vs, q_y, -high, 0, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, True, False,
        )  # fmt: skip
    box_t, box_y, box_x, depth, rows, columns = key_box(
        t, y, x, frames, height, width, RADIUS, FRAMES, STRIDE, CAUSAL, TILE_Y, TILE_X
    )
    size = depth * rows * columns
    for start in range(0, size, BLOCK_N):
        key, scores, slots, exists = box_scores(
            query, key_base, start, size, box_t, box_y, box_x, rows, columns, t, q_y, q_x, first_slot, height, width,
            stride_ks, scale, RADIUS, STRIDE, CAUSAL, ALIGNED, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        value = load_rows(value_base, slots * stride_vs, exists, HEAD_DIM, BLOCK_D, False)
        acc, top, total = softmax_step(scores, value, acc, top, total)

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
    RADIUS: tl.constexpr, FRAMES: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of queries: the walk of `near_forward` again. grad_out and grad_q: contiguous, as the output."""
    segment, t, y, x = load_tile(tiles_ptr)
    sample, first_row, first_slot, frames, height, width, run_low, run_high = load_segment(segments_ptr, segment)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    ROWS: tl.constexpr = TILE_Y * TILE_X * GROUP_BLOCK
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
            scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
        acc = walk_query_gradient(
            query, acc, grad_out, lse, delta, key_base, value_base, full, high, stride_ks, stride_vs, q_y, -high,
            scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    box_t, box_y, box_x, depth, rows, columns = key_box(
        t, y, x, frames, height, width, RADIUS, FRAMES, STRIDE, CAUSAL, TILE_Y, TILE_X
    )
    size = depth * rows * columns
    for start in range(0, size, BLOCK_N):
        key, scores, slots, exists = box_scores(
            query, key_base, start, size, box_t, box_y, box_x, rows, columns, t, q_y, q_x, first_slot, height, width,
            stride_ks, scale_log2, RADIUS, STRIDE, CAUSAL, ALIGNED, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        value = load_rows(value_base, slots * stride_vs, exists, HEAD_DIM, BLOCK_D, False)
        acc = query_gradient_step(scores, key, value, grad_out, lse, delta, acc)
    store_rows(grad_q_ptr + first * HEAD_DIM, at * HEAD_DIM, acc * scale, present, HEAD_DIM, BLOCK_D)


@triton.jit
def near_key_gradient(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, tiles_ptr, segments_ptr,
    stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, slots, scale, scale_log2,
    RADIUS: tl.constexpr, FRAMES: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
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
    top, bottom = queries_of(y, tl.minimum(y + TILE_Y, height) - 1, height, RADIUS, STRIDE)
    left, right = queries_of(x, tl.minimum(x + TILE_X, width) - 1, width, RADIUS, STRIDE)
    box_t, last = tl.maximum(t - FRAMES, 0), tl.minimum(t + FRAMES, frames - 1)
    if CAUSAL:
        box_t = t
        if FRAMES == 0:
            top = y
    rows, columns = bottom - top + 1, right - left + 1
    size = (last - box_t + 1) * rows * columns
    grad_key = tl.zeros([TILE_Y * TILE_X, BLOCK_D], dtype=tl.float32)
    grad_value = tl.zeros([TILE_Y * TILE_X, BLOCK_D], dtype=tl.float32)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        for start in range(0, size, BLOCK_Q):
            index = start + tl.arange(0, BLOCK_Q)
            exists = index < size
            q_t, q_y, q_x = box_positions(index, box_t, top, left, rows, columns)
            row = first_row + (q_t * height + q_y) * width + q_x
            query = load_rows(q_ptr + head * stride_qh, row * stride_qm, exists, HEAD_DIM, BLOCK_D, False)
            at = row * num_heads + head
            grad_out = load_rows(grad_out_ptr, at * HEAD_DIM, exists, HEAD_DIM, BLOCK_D, False)
            lse, delta = load_statistics(lse_ptr, delta_ptr, at, exists)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale_log2
            allowed = exists[None, :] & allowed_keys(
                q_t[None, :], q_y[None, :], q_x[None, :], t, k_y[:, None], k_x[:, None], height, width,
                RADIUS, STRIDE, CAUSAL,
            )  # fmt: skip
            scores = tl.where(allowed, scores, NOTHING)
            grad_key, grad_value = key_gradient_step(scores, query, value, grad_out, lse, delta, grad_key, grad_value)
    at = ((sample * slots + slot) * kv_heads + kv_head) * HEAD_DIM
    store_rows(grad_k_ptr, at, grad_key * scale, present, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr, at, grad_value, present, HEAD_DIM, BLOCK_D)
