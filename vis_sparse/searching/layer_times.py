"""The time of a plan's prefill as the sum of its layers' times, each kind of layer measured once on this machine."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from ..calibration.probe import Probe
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork
from .log import Log

_ROUNDS = 5


class LayerTimes:
    """Seconds of a prefill's decoder layers under a plan, for one sample.

    A layer's time is the median over rounds of its time over that of the dense layer beside it, times the dense
    layer's median: a slow minute of the machine hits both.
    """

    def __init__(self, probe: Probe, log: Log):
        """probe: of one sample, that which is timed."""
        self._probe, self._log = probe, log
        self._where = f"{platform.node()}, {probe.target.model.device}, {torch.get_num_threads()} threads"
        self._dense_work = probe.work(VisualPlan.dense(probe.plan.num_layers))[0]
        key = f"seconds of the dense layer, {self._where}"
        self._dense = log(key, lambda: [statistics.median(self._beside(self._dense_work)[1])])

    def __call__(self, plan: VisualPlan) -> float:
        return sum(map(self._seconds, self._probe.work(plan)))

    def _seconds(self, work: LayerWork) -> float:
        # which heads and neurons changes no time, only how many
        counts = [len(heads) for heads in (work.query_heads, work.key_heads, work.value_heads)]
        neurons = work.neurons if isinstance(work.neurons, int) else len(work.neurons)
        key = f"time of {counts}, {work.attention}, {work.reads}, {neurons}, {self._where}"
        (ratio,) = self._log(key, lambda: [statistics.median(own / dense for own, dense in zip(*self._beside(work)))])
        return ratio * self._dense[0]

    @torch.no_grad()
    def _beside(self, work: LayerWork) -> tuple[list[float], list[float]]:
        """Seconds by round of a layer of this work, and of the dense layer in turns with it."""
        own, dense = self._probe.layer_call(work), self._probe.layer_call(self._dense_work)
        rounds = [(_timed(own), _timed(dense)) for _ in range(_ROUNDS)]
        return [first for first, _ in rounds], [second for _, second in rounds]


def _timed(call: Callable[[], object]) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.timeit(1).median
