"""A linear layer on text rows and, cut, on visual rows, whose two products share one gradient of the weight.

Autograd would make the gradient of a cut as large as the weight, zeros but for the cut, and add it to the other one's:
three passes over each weight and room for it twice, as much as the products of a few text rows cost themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from .weights import index_on, product, select


class _Products(torch.autograd.Function):
    """x @ weight.T and part @ cut.T, cut: the weight's `indices` along `dim`."""

    @staticmethod
    def forward(ctx, x, part, weight, dim, indices):
        ctx.save_for_backward(x, part, weight)
        ctx.dim, ctx.indices = dim, indices
        return product(x, weight), product(part, select(weight, dim, indices))

    @staticmethod
    @once_differentiable
    def backward(ctx, slope, part_slope):
        x, part, weight = ctx.saved_tensors
        of_x = of_part = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = product(slope, weight.t())
        if ctx.needs_input_grad[1]:
            of_part = product(part_slope, select(weight, ctx.dim, ctx.indices).t())
        if ctx.needs_input_grad[2]:
            of_weight = slope.t() @ x
            cut = select(of_weight, ctx.dim, ctx.indices)
            if cut.untyped_storage().data_ptr() == of_weight.untyped_storage().data_ptr():
                cut.addmm_(part_slope.t(), part)
            else:
                index = index_on(tuple(ctx.indices), weight.device)
                of_weight.index_add_(ctx.dim, index, part_slope.t() @ part)
        return of_x, of_part, of_weight, None, None


def shares_gradient(weight: torch.Tensor) -> bool:
    """Whether a plain layer's weight trains in this call, where the products are what they look like."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and not torch.is_autocast_enabled(weight.device.type)
        and not torch.compiler.is_compiling()
    )


def products(
    x: torch.Tensor,
    part: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dim: int,
    indices: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, in) through the layer, and part through its cut: some outputs (dim 0) or inputs (dim 1)."""
    whole, cut = _Products.apply(x, part, weight, dim, indices)
    if bias is not None:
        whole, cut = whole + bias, cut + (select(bias, 0, indices) if dim == 0 else bias)
    return whole, cut
