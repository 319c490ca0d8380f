"""Triton kernel of `attention_mass`: the share of each query's softmax that falls on visual keys, in one pass."""

from __future__ import annotations

import triton
from triton import language as tl

from .triton_blocks import NOTHING, load_rows
from .triton_runs import block_scores, run_bounds


@triton.jit
def walk_mass(
    query, top, total, visual, key_base, low, high, stride_ks, column, shift, is_visual, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        _, scores = block_scores(
            query, key_base, slots, high, stride_ks, column, shift, 0, scale,
            HEAD_DIM, BLOCK_D, PRECISION, MASKED, False,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(new_top == NOTHING, 0.0, new_top)
        mass = tl.sum(tl.exp2(scores - anchor[:, None]), 1)
        keep = tl.exp2(top - anchor)
        total = total * keep + mass
        visual = visual * keep + mass * is_visual
        top = new_top
    return top, total, visual


@triton.jit
def mass_forward(
    q_ptr, k_ptr, mass_ptr, columns_ptr, blocks_ptr, offsets_ptr, runs_ptr, blind_ptr,
    stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BLIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mass (rows, heads), one head a program; `scale` includes log2(e). A row that reads nothing has mass 0."""
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
    key_base = k_ptr + sample.to(tl.int64) * stride_kb + head // GROUP * stride_kh
    top = tl.full([BLOCK_Q], NOTHING, dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    visual = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for run in range(tl.load(offsets_ptr + sample), tl.load(offsets_ptr + sample + 1)):
        low, full, high, shift, is_visual = run_bounds(runs_ptr, run, first_column, last_column, 0, 2147483647, BLOCK_N)
        if HAS_BLIND:
            high = tl.where(is_visual * tl.load(blind_ptr + head) > 0, low, high)
            full = tl.minimum(full, high)
        top, total, visual = walk_mass(
            query, top, total, visual, key_base, low, full, stride_ks, column, shift, is_visual, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, False,
        )  # fmt: skip
        top, total, visual = walk_mass(
            query, top, total, visual, key_base, full, high, stride_ks, column, shift, is_visual, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    mass = visual / tl.where(total == 0.0, 1.0, total)
    tl.store(mass_ptr + (first_row + row) * num_heads + head, mass, mask=present)
