"""The Triton kernel for decode steps: one query a sample over the slots that tables on the device let it read.

Nothing of a step is known on the host but the width of the stores. A program owns the heads of one KV group of a sample
(each key is read once for all of them) and a part of the slots; it stops at the last slot in use, so that room costs
nothing. `triton_runs.combine` joins the parts.
"""

from __future__ import annotations

import triton
from triton import language as tl

from .triton_blocks import NOTHING, load_rows, softmax_step, store_rows


@triton.jit
def steps_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, read_ptr, last_ptr, visual_ptr, blind_ptr,
    stride_qm, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_rb,
    slots, slots_a_split, scale,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_READ: tl.constexpr, HAS_LAST: tl.constexpr, HAS_BLIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (splits, samples, heads, HEAD_DIM) and lse (splits, samples, heads), in base 2.

    read (samples or 1, slots): what a sample reads. last: the last slot in use, int64. visual (slots,), blind (heads,):
    blind heads read no visual slots. All three are bytes. `scale` includes log2(e).
    """
    sample, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    member = tl.arange(0, GROUP_BLOCK)
    present = member < GROUP
    head = kv_head * GROUP + member
    num_heads = tl.num_programs(1) * GROUP
    query = load_rows(q_ptr + sample * stride_qm, head * stride_qh, present, HEAD_DIM, BLOCK_D, False)
    key_base = k_ptr + sample * stride_kb + kv_head * stride_kh
    value_base = v_ptr + sample * stride_vb + kv_head * stride_vh
    low = split * slots_a_split
    high = tl.minimum(low + slots_a_split, slots)
    if HAS_LAST:
        high = tl.minimum(high, tl.load(last_ptr).to(tl.int32) + 1)
    if HAS_BLIND:
        blind = tl.load(blind_ptr + head, mask=present, other=0) != 0

    acc = tl.zeros([GROUP_BLOCK, BLOCK_D], dtype=tl.float32)
    top = tl.full([GROUP_BLOCK], NOTHING, dtype=tl.float32)
    total = tl.zeros([GROUP_BLOCK], dtype=tl.float32)
    for start in range(low, high, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        read = slot < high
        if HAS_READ:
            read = tl.load(read_ptr + sample * stride_rb + slot, mask=read, other=0) != 0
        key = load_rows(key_base, slot * stride_ks, read, HEAD_DIM, BLOCK_D, False)
        value = load_rows(value_base, slot * stride_vs, read, HEAD_DIM, BLOCK_D, False)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where(read[None, :], scores, NOTHING)
        if HAS_BLIND:
            visual = tl.load(visual_ptr + slot, mask=read, other=0) != 0
            scores = tl.where(blind[:, None] & visual[None, :], NOTHING, scores)
        acc, top, total = softmax_step(scores, value, acc, top, total, PRECISION)

    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    first = split * tl.num_programs(0) + sample
    store_rows(out_ptr + first * num_heads * HEAD_DIM, head * HEAD_DIM, acc, present, HEAD_DIM, BLOCK_D)
    lse = tl.where(nothing, NOTHING, top + tl.log2(tl.where(nothing, 1.0, total)))
    tl.store(lse_ptr + first * num_heads + head, lse, mask=present)
