"""Times of what `bench kernels` does not time: text attention, gradients, and the fused operations beside torch's."""

from __future__ import annotations

from functools import partial

import torch

from ..bench_kernels import SETTINGS, Case
from .ceilings import median_seconds

_ROWS = {"decode, batch 8": 8, "prefill": 640}
_TEXT, _BEHIND = 64, 29  # text tokens of LLaVA's prompt, and those behind the image


def pieces(device: str, dry: bool) -> dict:
    """{"text": [{"setting", "prefill", "decode", "mass"}], "gradients": [...], "fused": [{"operation", "rows", "fused",
    "torch"}]}, in seconds a call."""
    place, dtype = torch.device(device), torch.float32 if dry else torch.bfloat16
    backend = "torch" if place.type == "cpu" else "triton"
    names = ["24x24"] if dry else [name for name in SETTINGS if name != "128x128"]
    return {
        "text": [_text(name, backend, place, dtype, dry) for name in names],
        "gradients": [_gradients(name, backend, place, dtype, dry) for name in names[:3]],
        "fused": _fused(place, dtype, dry),
    }


def _text(name: str, backend: str, place, dtype, dry: bool) -> dict:
    """Text queries over the whole prompt: all of them, and the next token's alone."""
    import numpy as np

    from ...kernels import get_backend
    from ...kernels.patterns import TextPattern

    case, run = _case(name, place, dtype, dry), get_backend(backend)
    slots = case.dense_pattern.slots
    length = slots.column.shape[1]
    columns = {"prefill": np.r_[: _TEXT - _BEHIND, length - _BEHIND : length], "decode": np.array([length - 1])}
    found = {"setting": name, "keys": length}
    with torch.no_grad():
        for phase, own in columns.items():
            pattern = TextPattern(own[None], slots, None, place)
            query = case.dense_query[:1, : len(own)].contiguous()
            arguments = query, case.key[:1], case.value[:1], pattern, case.scale
            found[phase] = median_seconds(partial(run.text_attention, *arguments), place)
        found["mass"] = median_seconds(lambda: run.attention_mass(query, case.key[:1], pattern, case.scale), place)
    return found


def _gradients(name: str, backend: str, place, dtype, dry: bool) -> dict:
    """A neighbourhood's forward and backward, radius 2."""
    from ...kernels import get_backend

    case, run = _case(name, place, dtype, dry), get_backend(backend)
    tensors = [t.requires_grad_() for t in (case.query, case.key, case.value)]

    def both():
        run.visual_attention(*tensors, case.patterns[2], case.scale).sum().backward()

    return {"setting": name, "radius": 2, "forward_and_backward": median_seconds(both, place)}


def _case(name: str, place, dtype, dry: bool) -> Case:
    return Case(name, 1, [2], "both", place, dtype, most_heads=1 if dry else None)


def _fused(place, dtype, dry: bool) -> list[dict]:
    """At the widths of LLaVA-1.5-7B."""
    from ...kernels import fused, fused_operations

    hidden, ffn, heads, head_dim = (64, 128, 4, 16) if dry else (4096, 11008, 32, 128)
    found = []
    for phase, rows in _ROWS.items():
        make = {"device": place, "dtype": dtype}
        x, delta, weight = (
            torch.randn(rows, hidden, **make),
            torch.randn(rows, hidden, **make),
            torch.ones(hidden, **make),
        )
        gate, up = torch.randn(2, rows, ffn, **make)
        query, key, value = torch.randn(3, rows, heads, head_dim, **make)
        cos, sin = torch.randn(2, rows, head_dim, **make)
        index = {"dtype": torch.int32, "device": place}
        store = torch.zeros(2, 2 * rows, heads, head_dim, **make)
        slots = fused.Slots(*store, torch.arange(rows, **index), torch.arange(heads, **index))
        calls = {
            "sum and norm": ("add_rms_norm", (x, [delta], weight, 1e-5)),
            "rotation into the store": ("rotate_into", (query, key, value, cos, sin, slots)),
            "gate": ("silu_mul", (gate, up)),
        }
        for operation, (name, arguments) in calls.items():
            ways = {"fused": fused_operations(x), "torch": fused}
            with torch.no_grad():
                times = {
                    way: median_seconds(partial(getattr(module, name), *arguments), place)
                    for way, module in ways.items()
                }
            found.append({"operation": operation, "rows": rows, "phase": phase, **times})
    return found
