"""What a decoder layer does around its products, in few launches: norms with the residual's sum, rotations with the
write into the cache, gates.

Every operation has a torch form, which is what CPUs, float64, `torch.compile` and gradients of gradients get, and a
Triton form (`fused_launches.py`) for tensors on a GPU (`kernels.fused_operations`). Both have the same signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class HeadNorm(NamedTuple):
    """RMS norm over the width of a head, of queries and of keys: weights (head_dim,)."""

    query: Tensor
    key: Tensor
    eps: float


class Slots(NamedTuple):
    """Where a call's keys and values go in a store.

    key, value: (slots, units, head_dim), the store with its samples one after the other. places: (rows,) slot of each
    row, no two the same; None: row r goes to slot r. units: (units,) head of keys and values that each head of the
    store takes; None: each its own. Both int32.
    """

    key: Tensor
    value: Tensor
    places: Tensor | None = None
    units: Tensor | None = None


def rms_norm(x: Tensor, weight: Tensor, eps: float, index: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over rows: x (rows, width), or its rows `index`. Differentiable."""
    x = x if index is None else x.index_select(0, index)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(
    x: Tensor, deltas: Sequence[Tensor], weight: Tensor, eps: float, start: int = 0, normed: int | None = None
) -> tuple[Tensor, Tensor]:
    """x (rows, width) with the one or two `deltas` added to its rows from `start` on, one after the other, and the norm
    of its first `normed` rows (None: all). x is changed in place unless gradients are recorded."""
    for delta in deltas:
        stop = start + len(delta)
        if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
            x = torch.cat([x[:start], x[start:stop] + delta, x[stop:]])
        else:
            x[start:stop] += delta
        start = stop
    return x, rms_norm(x[:normed], weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Rotary embedding of x (rows, heads, head_dim), after an RMS norm of every head if there is a weight (head_dim,).

    cos, sin: (rows, width <= head_dim), sin with the sign of its first half turned; columns from `width` on are not
    rotated. Differentiable in x and weight.
    """
    if weight is not None:
        x = rms_norm(x, weight, eps)
    width = cos.shape[-1]
    part, cos, sin = x[..., :width], cos[:, None], sin[:, None]
    part = torch.addcmul(part * cos, part.roll(width // 2, -1), sin)
    return part if width == x.shape[-1] else torch.cat([part, x[..., width:]], -1)


def rotate_into(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Slots,
    norm: HeadNorm | None = None,
) -> Tensor | None:
    """Queries (rows, heads, head_dim), rotated as by `rotate`; the keys, rotated, and the values (rows, kv_heads,
    head_dim) are written into a store. Without gradients, and without a look at `slots` on the host."""
    weights = (None, None, 0.0) if norm is None else norm
    turned = rotate(key, cos, sin, weights[1], weights[2])
    for store, new in ((slots.key, turned), (slots.value, value)):
        new = new if slots.units is None else new.index_select(1, slots.units.long())
        if slots.places is None:
            store[: len(new)] = new
        else:
            store.index_copy_(0, slots.places.long(), new)
    return None if query is None else rotate(query, cos, sin, weights[0], weights[2])


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (rows, width) each. Differentiable."""
    return torch.nn.functional.silu(gate) * up
