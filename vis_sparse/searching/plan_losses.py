"""What plans cost and lose, each measured once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np

from ..calibration.probe import Probe
from ..plans.plan import VisualPlan
from .log import Log
from .pareto import Point


class TimeUp(Exception):
    """A plan was to be measured after the time for it."""


def middle_sample(probe: Probe) -> int:
    """The sample of median length."""
    return int(np.argsort(probe.lengths, kind="stable")[probe.num_samples // 2])


class PlanLosses:
    """Points of plans on a probe's samples, exactly or roughly: on about `rough` of the samples.

    cost: of a plan, in any unit. until: time.monotonic() after which what is not known raises TimeUp; not limited at
    first.
    """

    until = float("inf")

    def __init__(self, probe: Probe, cost: Callable[[VisualPlan], float], log: Log, rough: int = 128):
        self._probe, self._cost, self._log = probe, cost, log
        self._start = self._dense = probe.plan
        # the unpatched model's: it has a tower that runs layers which nobody reads
        whole = cost(probe.plan.replace(tower=None))
        self._whole, self._every = whole, max(1, probe.num_samples // rough)
        self._points: dict[tuple[VisualPlan, bool], Point] = {}

    @property
    def dense(self) -> VisualPlan:
        """Of the vision encoder too, if the probe asks about it."""
        return self._dense

    @property
    def prompt(self) -> str:
        """The tokens of the sample for which costs are counted."""
        middle = middle_sample(self._probe)
        visual = self._probe.layouts[middle].num_visual
        return f"{visual} visual and {self._probe.lengths[middle] - visual} text tokens"

    def cost(self, plan: VisualPlan) -> float:
        """Share of the dense plan's cost."""
        return self._cost(plan) / self._whole

    def start_from(self, plan: VisualPlan) -> None:
        """Measure the plans to come from the layer on in which they leave `plan`: quick for its neighbours."""
        self._start = plan

    def __call__(self, plan: VisualPlan, rough: bool = False) -> Point:
        """The point of a plan whose heads are masks."""
        if (plan, rough) not in self._points:
            every = self._every if rough else 1
            key = hashlib.sha256(repr((self._probe.all_work(plan), every)).encode()).hexdigest()
            kl, accuracy = self._log(key, lambda: self._measure(plan, every))
            self._points[plan, rough] = Point(plan, self.cost(plan), kl, accuracy)
        return self._points[plan, rough]

    def _measure(self, plan: VisualPlan, every: int) -> list[float]:
        if time.monotonic() > self.until:
            raise TimeUp
        self._probe.adopt(self._start)
        return list(self._probe.measure(plan, every))
