"""The operations of `fused.py` as Triton kernels: same names, signatures and results, one launch each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import fused, triton_fused
from .fused import HeadNorm, Slots

HEADS_A_PROGRAM = 8
GATED_A_PROGRAM = 1024
# Rows of x are read, normed and written by one program; wider ones than this would not fit its registers.
_WIDEST = 16384
_GRADIENT_PROGRAMS = 256


def rms_norm(x: Tensor, weight: Tensor, eps: float, index: Tensor | None = None) -> Tensor:
    """As `fused.rms_norm`."""
    if not _takes(x, weight):
        return fused.rms_norm(x, weight, eps, index)
    if _records(x, weight):
        return _Norm.apply(x if index is None else x.index_select(0, index), weight, eps)
    rows = len(x) if index is None else len(index)
    return _norm(x, (), weight, eps, rows, rows, index=index)


def add_rms_norm(
    x: Tensor, deltas: Sequence[Tensor], weight: Tensor, eps: float, start: int = 0, normed: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `fused.add_rms_norm`."""
    if not _takes(x, weight) or _records(x, *deltas) or len(deltas) > 2:
        return fused.add_rms_norm(x, deltas, weight, eps, start, normed)
    normed = len(x) if normed is None else normed
    return x, _norm(x, [_rows(delta) for delta in deltas], weight, eps, len(x), normed, start)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """As `fused.rotate`."""
    if _records(x) or weight is not None and _records(weight):
        x = x if weight is None else rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
        return _Rotation.apply(x, cos, sin)
    return _rotated(x, cos, sin, weight, eps, back=False)


def rotate_into(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Slots,
    norm: HeadNorm | None = None,
) -> Tensor | None:
    """As `fused.rotate_into`."""
    rows, _, head_dim = key.shape
    key, value, cos, sin = _rows(key), _rows(value), _rows(cos), _rows(sin)
    out, heads, query = None, 0, key if query is None else query
    if query is not key:
        query, heads = _rows(query), query.shape[1]
        out = query.new_empty(query.shape)
    blocks, units = triton.cdiv(heads, HEADS_A_PROGRAM), slots.key.shape[1]
    weights = (None, None, 0.0) if norm is None else norm
    triton_fused.rotate_into[rows, blocks + triton.cdiv(units, HEADS_A_PROGRAM)](
        query, key, value, key if out is None else out, slots.key, slots.value, cos, sin, *weights[:2],
        slots.places, slots.units, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], cos.stride(0),
        sin.stride(0), *slots.key.stride()[:2], *slots.value.stride()[:2], heads, units, blocks, weights[2],
        HAS_NORM=norm is not None, HAS_PLACES=slots.places is not None, HAS_UNITS=slots.units is not None,
        **_head_sizes(head_dim, cos),
    )  # fmt: skip
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `fused.silu_mul`."""
    return _Gate.apply(gate, up) if _records(gate, up) else _gated(gate, up)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = x.new_empty(len(x), dtype=torch.float32)
        out = _norm(x, (), weight, eps, len(x), len(x), inverse=inverse)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, weight, inverse = ctx.saved_tensors
        x, grad_out, (rows, width) = _rows(x), grad_out.contiguous(), x.shape
        grad_x = torch.empty_like(grad_out)
        rows_a_part = max(triton.cdiv(rows, _GRADIENT_PROGRAMS), 1)
        parts = triton.cdiv(rows, rows_a_part)
        part = x.new_empty(parts, width, dtype=torch.float32)
        if parts:
            triton_fused.norm_gradient[parts,](
                x, weight, grad_out, inverse, grad_x, part, x.stride(0), rows, rows_a_part, width, **row_sizes(width)
            )
        return grad_x, part.sum(0).to(weight.dtype), None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, None, 0.0, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        return _rotated(grad_out, *ctx.saved_tensors, None, 0.0, back=True), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        gate, up = map(_rows, ctx.saved_tensors)
        grad_out, (rows, width) = grad_out.contiguous(), gate.shape
        grads = torch.empty_like(grad_out), torch.empty_like(grad_out)
        if rows:
            triton_fused.gate_gradient[rows, triton.cdiv(width, GATED_A_PROGRAM)](
                gate, up, grad_out, *grads, gate.stride(0), up.stride(0), width, BLOCK=GATED_A_PROGRAM
            )
        return grads


def _norm(x, deltas, weight, eps, rows, normed, start=0, index=None, inverse=None) -> Tensor:
    """One launch over `rows` rows. inverse: (rows,) float32, filled for the gradients."""
    if x.stride(-1) != 1:
        raise ValueError(f"x: got rows with stride {x.stride(-1)} between elements, expected 1")
    width, out = x.shape[1], x.new_empty(normed, x.shape[1])
    first, second = (*deltas, None, None)[:2]
    if rows:
        triton_fused.norm_forward[rows,](
            x, first, second, weight, out, inverse, index, x.stride(0), 0 if first is None else first.stride(0),
            0 if second is None else second.stride(0), start, 0 if first is None else len(first),
            0 if second is None else len(second), normed, width, eps, HAS_FIRST=first is not None,
            HAS_SECOND=second is not None, HAS_INDEX=index is not None, SAVE=inverse is not None, **row_sizes(width),
        )  # fmt: skip
    return out


def _rotated(x, cos, sin, weight, eps, back: bool) -> Tensor:
    x, cos, sin = _rows(x), _rows(cos), _rows(sin)
    (rows, heads, head_dim), out = x.shape, x.new_empty(x.shape)
    if rows:
        triton_fused.rotate_heads[rows, triton.cdiv(heads, HEADS_A_PROGRAM)](
            x, out, cos, sin, weight, *x.stride()[:2], cos.stride(0), sin.stride(0), heads, eps,
            HAS_NORM=weight is not None, BACK=back, **_head_sizes(head_dim, cos),
        )  # fmt: skip
    return out


def _gated(gate, up) -> Tensor:
    gate, up = _rows(gate), _rows(up)
    (rows, width), out = gate.shape, gate.new_empty(gate.shape)
    if rows:
        triton_fused.gate_forward[rows, triton.cdiv(width, GATED_A_PROGRAM)](
            gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=GATED_A_PROGRAM
        )
    return out


def row_sizes(width: int) -> dict:
    """A program has about 8 elements of a row a thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def _head_sizes(head_dim: int, cos: Tensor) -> dict:
    width = triton.next_power_of_2(head_dim)
    return {"HEAD_DIM": head_dim, "WIDTH": cos.shape[-1], "BLOCK_D": width, "BLOCK_H": HEADS_A_PROGRAM}


def _rows(x: Tensor) -> Tensor:
    """Rows (or heads of rows) whose elements follow one another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _takes(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.shape[-1] <= _WIDEST


def _records(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
