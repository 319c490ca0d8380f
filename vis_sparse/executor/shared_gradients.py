"""A linear layer on text rows and, cut, on visual rows, whose two products share one gradient of the weight.

Autograd would make the gradient of a cut as large as the weight, zeros but for the cut, and add it to the other one's:
three passes over each weight and room for it twice, as much as the products of a few text rows cost themselves.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .weights import Selection, autocasts, index_on, product


class _Products(torch.autograd.Function):
    """x @ weight.T and part @ cut.T, cut: the `selection` of the weight along `dim`."""

    @staticmethod
    def forward(ctx, x, part, weight, dim, selection):
        ctx.save_for_backward(x, part, weight)
        ctx.dim, ctx.selection = dim, selection
        return product(x, weight), product(part, selection(weight, dim))

    @staticmethod
    @once_differentiable
    def backward(ctx, slope, part_slope):
        x, part, weight = ctx.saved_tensors
        of_x = of_part = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = product(slope, weight.t())
        if ctx.needs_input_grad[1]:
            of_part = product(part_slope, ctx.selection(weight, ctx.dim).t())
        if ctx.needs_input_grad[2]:
            of_weight = slope.t() @ x
            if ctx.selection.is_view:
                ctx.selection(of_weight, ctx.dim).addmm_(part_slope.t(), part)
            else:
                index = index_on(ctx.selection.indices, weight.device)
                of_weight.index_add_(ctx.dim, index, part_slope.t() @ part)
        return of_x, of_part, of_weight, None, None


def shares_gradient(weight: torch.Tensor) -> bool:
    """Whether a plain layer's weight trains in this call, where the products are what they look like."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and not autocasts(weight.device)
        and not torch.compiler.is_compiling()
    )


def products(
    x: torch.Tensor,
    part: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dim: int,
    selection: Selection,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, in) through the layer, and part through its cut: some outputs (dim 0) or inputs (dim 1)."""
    whole, cut = _Products.apply(x, part, weight, dim, selection)
    if bias is not None:
        whole, cut = whole + bias, cut + (selection(bias, 0) if dim == 0 else bias)
    return whole, cut
