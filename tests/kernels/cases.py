"""Layouts, patterns and inputs that hurt, for every backend, and the comparison with the float64 reference."""

from __future__ import annotations

import numpy as np
import torch

from vis_sparse.kernels import reference
from vis_sparse.kernels.patterns import TextPattern, VisualPattern
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.layout.packing import Packing, pack, places_of
from vis_sparse.plans.layer_plan import Neighborhood

CPU = torch.device("cpu")

# per sample: (first position, grid) of its segments; and the columns of the batch
LAYOUTS = {
    "1x1": ([[(3, (1, 1, 1))]], 6),
    "1xN": ([[(0, (1, 1, 37))]], 40),
    "Nx1": ([[(2, (1, 19, 1))]], 23),
    "primes": ([[(5, (1, 7, 11))]], 85),
    "ragged": ([[(5, (1, 5, 7)), (42, (2, 3, 3))], [(60, (1, 1, 9))], []], 74),
    "frames": ([[(1, (3, 4, 5)), (61, (2, 2, 7))]], 93),
    "long text": ([[(70, (1, 6, 5))], [(33, (1, 7, 6))]], 104),
}
PATTERNS = {
    "near": Neighborhood(2, "both"),
    "self": Neighborhood(0, "causal"),
    "causal": Neighborhood(3, "causal"),
    "beyond the grid": Neighborhood(15, "both"),
    "beyond, causal": Neighborhood(15, "causal", frames=1),
    "frames": Neighborhood(1, "both", frames=1),
    "stride": Neighborhood(1, "both", stride=3),
    "stride, causal": Neighborhood(2, "causal", stride=2),
    "aligned": Neighborhood(2, "both", stride=4),
    "full": "full",
}


def packing(name: str, thinned: bool = False) -> Packing:
    """thinned: after about two of three visual tokens left, as the layers behind see the rest."""
    grids, length = LAYOUTS[name]
    packed = pack(VisualLayout.from_grids(grids), length)
    if not thinned:
        return packed
    stays = np.random.default_rng(0).random(packed.num_visual) < 0.35
    stays[0] = True
    left = packed.keep(np.flatnonzero(stays))
    return left.moved(places_of(left.slots(), length))


def visual_pattern(layout: str, attention, device=CPU, thinned: bool = False) -> VisualPattern:
    packed = packing(layout, thinned)
    return VisualPattern(attention, packed.visual, packed.slots(), device)


def text_pattern(layout: str, blind=None, queries: int | None = None, device=CPU, thinned: bool = False) -> TextPattern:
    """All text rows of the layout, or the last `queries` columns of every sample, as decoding asks for them."""
    packed = packing(layout, thinned)
    columns = packed.text_columns
    if queries is not None:
        columns = np.broadcast_to(np.arange(packed.length - queries, packed.length), (packed.batch, queries))
    return TextPattern(columns, packed.slots(), blind, device)


def inputs(pattern, heads: int, kv_heads: int, head_dim: int, dtype=torch.float32, seed: int = 0):
    """Query, key and value of a pattern, on its device."""
    generator = torch.Generator().manual_seed(seed)
    rows = pattern.query_columns.shape if isinstance(pattern, TextPattern) else pattern.query.sample.shape
    slots = (*pattern.slots.sample.shape, kv_heads, head_dim)
    shapes = ((*rows, heads, head_dim), slots, slots)
    return [torch.randn(shape, generator=generator).to(pattern.device, dtype).requires_grad_() for shape in shapes]


def errors(module, pattern, tensors, gradients: bool = True) -> dict[str, float]:
    """Largest difference to the float64 reference, of the output and of every gradient, over its largest value (or
    over 0.1: where a query reads one key alone, its gradient is zero)."""
    name = "text_attention" if isinstance(pattern, TextPattern) else "visual_attention"
    scale = tensors[0].shape[-1] ** -0.5

    def run(operation, arguments):
        arguments = [t.detach().requires_grad_(gradients) for t in arguments]
        out = operation(*arguments, pattern, scale)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        return out, *(torch.autograd.grad(out, arguments, weights) if gradients else ())

    expected = run(getattr(reference, name), [t.double() for t in tensors])
    actual = run(getattr(module, name), tensors)
    assert all(a.isfinite().all() and a.shape == e.shape for a, e in zip(actual, expected))
    pairs = zip(("out", "query", "key", "value"), actual, expected)
    return {
        part: float((a.double() - e).detach().abs().max() / e.detach().abs().max().clamp(min=0.1))
        for part, a, e in pairs
    }
