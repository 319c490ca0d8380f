"""Inputs of the fused operations, and their largest error."""

from __future__ import annotations

import torch

from vis_sparse.kernels import fused

WIDTHS = (1, 40, 130)
HEAD_DIMS = ((16, 16), (24, 24), (80, 80), (32, 8), (24, 12))  # head_dim, rotated columns


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (count, width), as the executor has them: the sign of sin's first half is turned."""
    angle = rows(count, width // 2, seed=9).repeat(1, 2)
    sign = torch.ones(width)
    sign[: width // 2] = -1
    return angle.cos(), angle.sin() * sign


def largest_error(name: str, module, *arguments) -> float:
    """Of a module's operation to the torch form in float64: output and every gradient, over their largest value."""

    def run(operation, dtype):
        moved = [
            a.detach().to(dtype).requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
            for a in arguments
        ]
        wanted = [a for a in moved if torch.is_tensor(a) and a.requires_grad]
        if name == "rotate":  # cos and sin come from the rotary module
            wanted = [a for i, a in enumerate(moved) if i not in (1, 2) and torch.is_tensor(a)]
        out = operation(*moved)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape).to(out.device)
        with torch.no_grad():
            again = operation(*moved)  # without recording: the launch of inference
        return out, again, *torch.autograd.grad(out, wanted, weights)

    expected, found = run(getattr(fused, name), torch.float64), run(getattr(module, name), arguments[0].dtype)
    worst = [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.isfinite().all()
        if theirs.numel():
            worst.append(
                float((ours.double() - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=0.1))
            )
    return max(worst)
