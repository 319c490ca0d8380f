"""The time of a plan's prefill as the sum of its layers' times, each kind of layer measured once on this machine."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.benchmark import Timer

from ..calibration.probe import Probe
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork
from .log import Log

_ROUNDS = 5


class LayerTimes:
    """Seconds of a prefill's decoder layers under a plan, for one sample; with those of the vision encoder if the probe
    asks about it.

    A layer's time is the median over rounds of its time over that of the dense layer beside it, times the dense
    layer's median: a slow minute of the machine hits both.
    """

    def __init__(self, probe: Probe, log: Log):
        """probe: of one sample, that which is timed."""
        self._probe, self._log = probe, log
        self._where = f"{platform.node()}, {probe.target.model.device}, {torch.get_num_threads()} threads"
        self._dense_work = probe.work(VisualPlan.dense(probe.plan.num_layers))[0]
        key = f"seconds of the dense layer, {self._where}"
        self._dense = log(key, lambda: [statistics.median(self._beside(probe.layer_call(self._dense_work))[1])])

    def __call__(self, plan: VisualPlan) -> float:
        decoder = (self._seconds(_key(work), partial(self._probe.layer_call, work)) for work in self._probe.work(plan))
        return sum(decoder) + self._of_tower(plan)

    def _of_tower(self, plan: VisualPlan) -> float:
        seconds, left = 0.0, []
        for index, work in enumerate(self._probe.tower_work(plan)):
            if work is not None:
                tower = self._probe.tower_plan(plan)
                windowed = self._probe.vision.tower.layers[index].windowed
                key = f"encoder's {_key(work)}, {windowed}, of {left}"
                seconds += self._seconds(key, partial(self._probe.tower_layer_call, tower, index))
                left += [str(work.tokens)] if work.tokens else []
        return seconds

    def _seconds(self, key: str, layer_call: Callable[[], Callable[[], object]]) -> float:
        key = f"time of {key}, {self._where}"
        (ratio,) = self._log(key, lambda: [self._ratio(layer_call())])
        return ratio * self._dense[0]

    def _ratio(self, call: Callable[[], object]) -> float:
        return statistics.median(own / dense for own, dense in zip(*self._beside(call)))

    @torch.no_grad()
    def _beside(self, own: Callable[[], object]) -> tuple[list[float], list[float]]:
        """Seconds by round of a layer's call, and of the dense layer in turns with it."""
        dense = self._probe.layer_call(self._dense_work)
        rounds = [(_timed(own), _timed(dense)) for _ in range(_ROUNDS)]
        return [first for first, _ in rounds], [second for _, second in rounds]


def _key(work: LayerWork) -> str:
    # which heads and neurons changes no time, only how many
    counts = [len(heads) for heads in (work.query_heads, work.key_heads, work.value_heads)]
    neurons = work.neurons if isinstance(work.neurons, int) else len(work.neurons)
    return f"{counts}, {work.attention}, {work.reads}, {neurons}"


def _timed(call: Callable[[], object]) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.timeit(1).median
