"""What all Triton kernels share: reading rows, one step of the online softmax, and of its gradients.

PRECISION: how products of float32 are done (`tuning.precision`); without effect on fp16 and bf16.
"""

from __future__ import annotations

import triton
from triton import language as tl

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def load_rows(base, offsets, present, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALL: tl.constexpr):
    """(rows, BLOCK_D) at base + offsets. Zero where not `present` (unless ALL are) and beyond HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + offsets[:, None] + columns[None, :]
    if ALL and HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    if ALL:
        return tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)
    return tl.load(pointers, mask=present[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def store_rows(base, offsets, value, present, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    pointers = base + offsets[:, None] + columns[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=present[:, None] & (columns[None, :] < HEAD_DIM))


@triton.jit
def softmax_step(scores, value, acc, top, total, PRECISION: tl.constexpr):
    """One block of keys into the online softmax. scores (rows, keys) are in base 2, NOTHING where not read.

    acc (rows, BLOCK_D), top and total (rows,): unnormalised output, running maximum and sum.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has read nothing yet: NOTHING - NOTHING would be NaN
    shift = tl.where(new_top == NOTHING, 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(top - shift)
    total = total * keep + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * keep[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def query_gradient_step(scores, key, value, grad_out, lse, delta, acc, PRECISION: tl.constexpr):
    """One block of keys into the gradient of queries, before the scale. lse, delta: (rows,)."""
    weights = tl.exp2(scores - lse[:, None])
    grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, acc, input_precision=PRECISION)


@triton.jit
def key_gradient_step(scores, query, value, grad_out, lse, delta, grad_key, grad_value, PRECISION: tl.constexpr):
    """One block of queries into the gradients of keys (before the scale) and values. scores: (keys, rows)."""
    weights = tl.exp2(scores - lse[None, :])
    grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
    grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit
def load_statistics(lse_ptr, delta_ptr, index, present):
    """lse (0 where a row has read nothing, so that its weights are exp2(NOTHING) = 0) and delta of rows."""
    lse = tl.load(lse_ptr + index, mask=present, other=0.0)
    delta = tl.load(delta_ptr + index, mask=present, other=0.0)
    return tl.where(lse == NOTHING, 0.0, lse), delta
