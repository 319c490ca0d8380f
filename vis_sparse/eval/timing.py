"""Paired timing: several variants of one computation in turns, so that a slow minute of the machine hits all alike."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that `call` takes, with everything it queued on `device` finished."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class PartTime:
    """Seconds that a module takes within calls of the model around it; open it as a `with` block.

    On a GPU by events of its stream, so that nothing waits for them in between.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self._module, self._device, self._marks = module, device, []

    def __enter__(self) -> PartTime:
        self._hooks = [
            self._module.register_forward_pre_hook(self._mark),
            self._module.register_forward_hook(self._mark),
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _mark(self, *call) -> None:
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        self._marks.append(event)

    def last(self) -> float:
        """Of the last call, everything queued on the device finished."""
        start, end = self._marks[-2:]
        return end - start if self._device.type == "cpu" else start.elapsed_time(end) / 1e3


def in_turns(
    variants: Sequence[str],
    measure: Callable[[str], dict[str, float]],
    repeats: int,
    on_turn: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Measure every variant once a round, in an order that rotates by one each round.

    measure: variant -> {quantity: value}. on_turn(done, total): called after each.
    Returns {variant: {quantity: [value of round 0, round 1, ...]}}.
    """
    samples = {variant: {} for variant in variants}
    for turn in range(repeats):
        shift = turn % len(variants)
        for place, variant in enumerate((*variants[shift:], *variants[:shift])):
            for quantity, value in measure(variant).items():
                samples[variant].setdefault(quantity, []).append(value)
            on_turn(turn * len(variants) + place + 1, repeats * len(variants))
    return samples


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def machine_facts(device: torch.device) -> dict:
    """Where a measurement was made: {machine, versions, date}."""
    machine = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device) if device.type != "cuda" else torch.cuda.get_device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
    }
    versions = {name: _version(name) for name in ("vis_sparse", "torch", "transformers", "triton")}
    versions["python"] = platform.python_version()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"machine": machine, "versions": versions, "date": date}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # a checkout run from its folder


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
