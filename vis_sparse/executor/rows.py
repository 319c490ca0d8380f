"""Rotary embedding and residual additions of rows, with and without overwriting them."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (rows, heads, head_dim); sin has the sign of its first half turned (`Call.split`).

    Where cos and sin are narrower than a head, the rest of the head is not rotated.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], -1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_into(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`rotate`, written to `out`, which may be x itself."""
    width = cos.size(-1)
    if width < x.size(-1):
        if out.data_ptr() != x.data_ptr():
            out[..., width:] = x[..., width:]
        out, x = out[..., :width], x[..., :width]
    torch.addcmul(x * cos, x.roll(width // 2, -1), sin, out=out)


def add_rows(x: torch.Tensor, start: int, delta: torch.Tensor) -> torch.Tensor:
    """x with `delta` added to its rows from `start` on; in place unless gradients are recorded."""
    stop = start + delta.shape[0]
    if not (x.requires_grad or delta.requires_grad):
        (x if delta.shape[0] == x.shape[0] else x[start:stop]).add_(delta)
        return x
    if stop - start == x.shape[0]:
        return x + delta
    return torch.cat([x[:start], x[start:stop] + delta, x[stop:]])
