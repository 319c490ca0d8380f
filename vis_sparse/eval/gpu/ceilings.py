"""What the device reaches at best: a matrix product, a copy, and how soon Python can ask for the next launch."""

from __future__ import annotations

import statistics
import time

import torch

_LAUNCHES = 2000


def ceilings(device: str, dry: bool) -> dict:
    """{"product_tflops", "copy_gbs" (read and written), "launch_us" (an eager operation), "kernel_launch_us" (a Triton
    kernel; None without one)}."""
    place = torch.device(device)
    dtype, side, size = (torch.float32, 256, 2**16) if dry else (torch.bfloat16, 8192, 2**30)
    a, b = (torch.randn(side, side, device=place, dtype=dtype) for _ in range(2))
    source = torch.zeros(size, device=place, dtype=dtype)
    target, one = torch.empty_like(source), torch.zeros(1, device=place)
    product, copy = median_seconds(lambda: a @ b, place), median_seconds(lambda: target.copy_(source), place)
    return {
        "product_tflops": 2 * side**3 / product / 1e12,
        "copy_gbs": 2 * size * source.element_size() / copy / 1e9,
        "launch_us": _asked(lambda: one.add_(1), place),
        "kernel_launch_us": _asked(lambda: _kernel(one), place) if place.type == "cuda" else None,
    }


def median_seconds(call, place: torch.device, rounds: int = 7, calls: int = 5) -> float:
    """Of one call, from the median of some rounds of some calls; the first round is not counted."""
    from ..timing import timed

    def several():
        for _ in range(calls):
            call()

    return statistics.median([timed(several, place) for _ in range(rounds)][1:]) / calls


def _asked(call, place: torch.device) -> float:
    """Microseconds until the host has asked for a call, many in a row."""
    from ..timing import synchronize

    call()
    synchronize(place)
    began = time.perf_counter()
    for _ in range(_LAUNCHES):
        call()
    asked = time.perf_counter() - began
    synchronize(place)
    return asked / _LAUNCHES * 1e6


def _kernel(x: torch.Tensor) -> None:
    from ...kernels import fused_launches

    fused_launches.silu_mul(x[None], x[None])
