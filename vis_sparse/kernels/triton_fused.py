"""Triton kernels of what a decoder layer does around its products: norms, rotations, gates (`fused.py` launches them).

All compute in float32 and round once. Rows lie anywhere a row stride can say; a row itself is contiguous.
"""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def norm_forward(
    x_ptr, first_ptr, second_ptr, weight_ptr, out_ptr, inverse_ptr, index_ptr,
    stride_x, stride_first, stride_second, start, first_rows, second_rows, normed, width, eps,
    BLOCK: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_INDEX: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """A program: one row. out (rows, width) = RMS norm of x's row, or of row `index` of x; inverse (rows,), if SAVE:
    one over the root. With `first`, x is changed: its rows from `start` on get the rows of `first` and after them those
    of `second` added. Rows from `normed` on are not normed."""
    line = tl.program_id(0)
    row = line
    if HAS_INDEX:
        row = tl.load(index_ptr + line)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = x_ptr + row.to(tl.int64) * stride_x + columns
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if HAS_FIRST:
        own = line - start
        added = inside & (own >= 0) & (own < first_rows)
        x += tl.load(first_ptr + own.to(tl.int64) * stride_first + columns, mask=added, other=0.0).to(tl.float32)
        if HAS_SECOND:
            own -= first_rows
            added = inside & (own >= 0) & (own < second_rows)
            x += tl.load(second_ptr + own.to(tl.int64) * stride_second + columns, mask=added, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty)
        tl.store(place, x, mask=inside)
        x = x.to(tl.float32)  # what is kept is what is normed
    if line < normed:
        inverse = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        out = (x * inverse * weight).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + line.to(tl.int64) * width + columns, out, mask=inside)
        if SAVE:
            tl.store(inverse_ptr + line, inverse)


@triton.jit
def norm_gradient(
    x_ptr, weight_ptr, grad_out_ptr, inverse_ptr, grad_x_ptr, part_ptr, stride_x, rows, rows_a_part, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of x (rows, width) and, of a part of the rows, of the weight: part (programs, width), float32.
    grad_out and grad_x are contiguous."""
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(part * rows_a_part, tl.minimum((part + 1) * rows_a_part, rows)):
        at = tl.cast(row, tl.int64)
        inverse = tl.load(inverse_ptr + row)
        unit = tl.load(x_ptr + at * stride_x + columns, mask=inside, other=0.0).to(tl.float32) * inverse
        grad_out = tl.load(grad_out_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
        grad_weight += grad_out * unit
        grad_unit = grad_out * weight
        grad_x = inverse * (grad_unit - unit * (tl.sum(grad_unit * unit, 0) / width))
        tl.store(grad_x_ptr + at * width + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(part_ptr + part.to(tl.int64) * width + columns, grad_weight, mask=inside)


@triton.jit
def turned(
    base, offsets, present, cos_ptr, sin_ptr, weight_ptr, eps,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORM: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Heads (heads, BLOCK_D) at base + offsets of one token, float32: normed over their width if HAS_NORM, then rotated
    in their first WIDTH columns. cos, sin: of the token; the sign of sin's first half is turned. BACK: the transposed
    rotation, for gradients."""
    columns = tl.arange(0, BLOCK_D)
    half: tl.constexpr = WIDTH // 2
    rotated = columns < WIDTH
    other = tl.where(columns < half, columns + half, columns - half)
    inside = present[:, None] & (columns < HEAD_DIM)[None, :]
    beside = present[:, None] & rotated[None, :]
    x = tl.load(base + offsets[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(base + offsets[:, None] + other[None, :], mask=beside, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x *= inverse * tl.load(weight_ptr + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
        y *= inverse * tl.load(weight_ptr + other, mask=rotated, other=0.0).to(tl.float32)[None, :]
    cos = tl.load(cos_ptr + columns, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + (other if BACK else columns), mask=rotated, other=0.0).to(tl.float32)
    return x * cos[None, :] + y * sin[None, :]


@triton.jit
def rotate_heads(
    x_ptr, out_ptr, cos_ptr, sin_ptr, weight_ptr, stride_xm, stride_xh, stride_cos, stride_sin, heads, eps,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, HAS_NORM: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """out (rows, heads, HEAD_DIM), contiguous. A program: BLOCK_H heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    present = head < heads
    x = turned(
        x_ptr + row * stride_xm, head * stride_xh, present, cos_ptr + row * stride_cos, sin_ptr + row * stride_sin,
        weight_ptr, eps, HEAD_DIM, WIDTH, BLOCK_D, HAS_NORM, BACK,
    )  # fmt: skip
    store_heads(out_ptr + row * heads * HEAD_DIM, head * HEAD_DIM, x, present, HEAD_DIM, BLOCK_D)


@triton.jit
def store_heads(base, offsets, x, present, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = present[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def rotate_into(
    q_ptr, k_ptr, v_ptr, out_ptr, store_k_ptr, store_v_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    places_ptr, units_ptr, stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh, stride_cos, stride_sin,
    stride_sk, stride_skh, stride_sv, stride_svh, heads, units, query_blocks, eps,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_PLACES: tl.constexpr, HAS_UNITS: tl.constexpr,
):  # fmt: skip
    """Of one row, BLOCK_H query heads (programs of the second axis below `query_blocks`) into `out`, (rows, heads,
    HEAD_DIM), or BLOCK_H heads of keys and values into slot `places` of a store, whose head u takes head `units[u]`;
    without these, into the row's own and head u."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_base, sin_base = cos_ptr + row * stride_cos, sin_ptr + row * stride_sin
    if part < query_blocks:
        head = part * BLOCK_H + tl.arange(0, BLOCK_H)
        present = head < heads
        query = turned(
            q_ptr + row * stride_qm, head * stride_qh, present, cos_base, sin_base, q_weight_ptr, eps,
            HEAD_DIM, WIDTH, BLOCK_D, HAS_NORM, False,
        )  # fmt: skip
        store_heads(out_ptr + row * heads * HEAD_DIM, head * HEAD_DIM, query, present, HEAD_DIM, BLOCK_D)
    else:
        place = row
        if HAS_PLACES:
            place = tl.load(places_ptr + row).to(tl.int64)
        unit = (part - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        present = unit < units
        head = unit
        if HAS_UNITS:
            head = tl.load(units_ptr + unit, mask=present, other=0)
        key = turned(
            k_ptr + row * stride_km, head * stride_kh, present, cos_base, sin_base, k_weight_ptr, eps,
            HEAD_DIM, WIDTH, BLOCK_D, HAS_NORM, False,
        )  # fmt: skip
        store_heads(store_k_ptr + place * stride_sk, unit * stride_skh, key, present, HEAD_DIM, BLOCK_D)
        columns = tl.arange(0, BLOCK_D)
        inside = present[:, None] & (columns < HEAD_DIM)[None, :]
        at = v_ptr + row * stride_vm + (head * stride_vh)[:, None] + columns[None, :]
        value = tl.load(at, mask=inside, other=0.0)
        store_heads(store_v_ptr + place * stride_sv, unit * stride_svh, value, present, HEAD_DIM, BLOCK_D)


@triton.jit
def gate_forward(gate_ptr, up_ptr, out_ptr, stride_gate, stride_up, width, BLOCK: tl.constexpr):
    """out (rows, width) = silu(gate) * up. A program: BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_gradient(
    gate_ptr, up_ptr, grad_out_ptr, grad_gate_ptr, grad_up_ptr, stride_gate, stride_up, width, BLOCK: tl.constexpr
):
    """Gradients of gate and up, contiguous as grad_out is."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + columns, mask=inside, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    grad_up = grad_out * gate * share
    grad_gate = grad_out * up * share * (1 + gate * (1 - share))
    tl.store(grad_gate_ptr + row * width + columns, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + row * width + columns, grad_up.to(grad_up_ptr.dtype.element_ty), mask=inside)
