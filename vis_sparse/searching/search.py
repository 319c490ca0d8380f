"""Search: the plan for a budget, by measured loss.

Three ways to find plans, in this order: greedy steps down from dense; the chains of the published methods; exchanges,
which from the best plan so far give cost back in one layer and take it in another, or swap two layers. Exchanges are
made at half of the cost, at a quarter and so on down to the budget, with greedy steps from each to the next: what is
best at a small budget is often near what is best at a larger one, and far from where the first way down ends. A
candidate's loss is measured on the model, from the layer on in which it leaves the plan that it was made from;
candidates are ranked by a rough measurement, results have an exact one.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from ..cost.flops import flops
from ..cost.report import CostReport
from ..cost.shape_lookup import shape_of
from ..cost.shapes import ModelShape
from ..cost.tower import tower_flops
from ..plans.layer_plan import PlanError
from ..plans.plan import VisualPlan, layer_at, with_layer
from ..plans.scores import Calibration
from .changes import LayerChange, LayerChanges
from .pareto import Point
from .plan_losses import PlanLosses, TimeUp, middle_sample

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

    from ..calibration.probe import Probe


class Cost(NamedTuple):
    """What a budget is a share of. counted: from the decoder's cost and the vision encoder's FLOPs; None if it is
    measured, in seconds. tower: whether the encoder's layers are changed too."""

    counted: Callable[[CostReport, int], int] | None
    tower: bool = False


COSTS = {
    "visual": Cost(lambda cost, tower: cost.prefill.lane("visual")),
    "prefill": Cost(lambda cost, tower: cost.total),
    "kv": Cost(lambda cost, tower: cost.kv_visual_bytes),
    "time": Cost(None),
    "all": Cost(lambda cost, tower: cost.prefill.lane("visual") + tower, tower=True),
    "all-time": Cost(None, tower=True),
}
OBJECTIVES: dict[str, Callable[[Point], float]] = {
    "kl": lambda point: point.kl,
    # KL parts plans that answer equally many samples right, as most do
    "accuracy": lambda point: 1 - point.accuracy + 0.01 * point.kl,
}
_FREE = 1e-5  # a loss that is as good as none: among free steps the one that saves most is taken
_AS_DENSE = 1e-4  # a loss at which no answer changes: nothing is exchanged to lower it
_TRIES = 32  # exchanges measured in a round


class Settings(TypedDict, total=False):
    """Settings of a search beside its budget and objective, for type checkers; `search_front` has their defaults."""

    cost: str
    calibration: Calibration | None
    time_limit: float | None
    batch: int
    log: str | Path | None


def search(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    *,
    budget: float = 0.25,
    objective: str = "kl",
    **settings: Unpack[Settings],
) -> VisualPlan:
    """The best plan that costs at most `budget` of the dense model. Settings: those of `search_front`."""
    points = search_front(model, samples, budget=budget, objective=objective, **settings)
    return best_within(points, budget, objective).plan


def best_within(points: Iterable[Point], budget: float, objective: str = "kl") -> Point:
    """The point of least loss that costs at most `budget`, the cheaper one of equals."""
    return min((p for p in points if p.cost <= budget), key=lambda p: (OBJECTIVES[objective](p), p.cost))


def search_front(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    *,
    budget: float = 0.25,
    cost: str = "visual",
    objective: str = "kl",
    calibration: Calibration | None = None,
    time_limit: float | None = None,
    batch: int = 16,
    log: str | Path | None = None,
) -> Iterator[Point]:
    """Plans from dense to `budget`, as they are found: the greedy way down, the published methods, better ones at
    each halving of the cost.

    samples: as `calibrate` takes them, with labels; a search fits those that it has, so take some hundreds. budget:
    share in (0, 1] of the dense model's `cost`: "visual", FLOPs of the visual lane in prefill; "prefill", FLOPs of the
    decoder; "kv", bytes of visual keys and values; "time", seconds of the decoder's prefill on this machine
    (`layer_times.LayerTimes`). "all", FLOPs of the vision encoder and of the visual lane, and "all-time", seconds of
    the encoder's and the decoder's layers, change the encoder's layers too: plans then have a tower section. All of
    them for the sample of median length. objective: "kl", or "accuracy" of the labels. calibration: a `Calibration` of
    the model, or its file: which heads and neurons go first, those of the encoder too where that is changed
    (`calibrate(..., tower=True)`); made from the samples if None. time_limit: seconds after which candidates are not
    measured again before a step (each step still is), and nothing is tried after the way down. batch: samples in one
    call. log: a file that holds what was measured; a search that is stopped and started again with it goes on, and a
    search for another budget uses it.

    Raises PlanError for settings out of range, PatchError and SampleError as `calibrate` does.
    """
    from ..calibration.measure import calibrate
    from ..calibration.profiles import Target
    from ..calibration.samples import on_device
    from ..calibration.vision import Vision
    from ..patches.calibrated import checked_calibration, checked_tower
    from .published import chains

    if not 0 < budget <= 1:
        raise PlanError(f"budget: got {budget!r}, expected a share in (0, 1]")
    with_tower = cost_of(cost).tower
    if objective not in OBJECTIVES:
        raise PlanError(f"objective: got {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    samples = [on_device(sample, model) for sample in samples]
    if calibration is None:
        calibration = calibrate(model, samples, tower=with_tower)
    else:
        target = Target.of(model)
        calibration = checked_calibration(calibration, model, target.text_model, target.decoder)
        vision = Vision.of(target) if with_tower else None
        if vision is not None and checked_tower(calibration, vision.module, vision.tower) is None:
            raise PlanError("calibration: got one without scores of the vision encoder, expected calibrate(tower=True)")
    meter, kv_heads = meter_of(model, samples, cost, batch, log), shape_of(model).kv_heads
    ladder = LayerChanges(calibration, kv_heads, with_tower)

    def published() -> Iterator[VisualPlan]:
        # they say nothing of the vision encoder
        def whole(plan: VisualPlan) -> VisualPlan:
            return plan.replace(tower=meter.dense.tower)

        methods = chains(calibration.heads, kv_heads, lambda plan: OBJECTIVES[objective](meter(whole(plan))))
        return map(whole, itertools.chain.from_iterable(methods.values()))

    yield from points_to(budget, meter, ladder, f"a prompt of {meter.prompt}", objective, time_limit, published)


def points_to(
    budget: float,
    meter: PlanLosses,
    ladder: LayerChanges,
    prompt: str,
    objective: str = "kl",
    time_limit: float | None = None,
    published: Callable[[], Iterable[VisualPlan]] = tuple,
    start: VisualPlan | None = None,
) -> Iterator[Point]:
    """`search_front` with whatever measures plans. prompt: what costs are of, in words. published: plans to go on from
    beside those on the way down. start: of that way, the dense plan if None."""
    loss = OBJECTIVES[objective]
    end = float("inf") if time_limit is None else time.monotonic() + time_limit

    def ways() -> Iterator[Point]:
        yield from _descend(meter, ladder, loss, meter(start or meter.dense), budget, end)
        meter.until = end
        meter.start_from(meter.dense)
        stages = _stages(budget)
        yield from map(meter, (plan for plan in published() if meter.cost(plan) <= stages[0]))
        before = None
        for share in stages:
            if before is not None:
                yield from _descend(meter, ladder, loss, before, share, end)
            yield from _exchange(meter, ladder, loss, best_within(found, share, objective), share)
            before = best_within(found, share, objective)

    found: list[Point] = []
    about = f"Found by vis_sparse.search; costs are of {prompt}."
    with suppress(TimeUp):
        for point in ways():
            found.append(replace(point, plan=point.plan.replace(name="searched", about=about)))
            yield found[-1]


def cost_of(name: str) -> Cost:
    """A cost by its name. Raises PlanError."""
    if name not in COSTS:
        raise PlanError(f"cost: got {name!r}, expected one of {', '.join(COSTS)}")
    return COSTS[name]


def meter_of(
    model, samples: Sequence[dict], cost: str = "visual", batch: int = 16, log: str | Path | None = None
) -> PlanLosses:
    """What measures plans in a search with these settings (`search_front`), with what is in its log."""
    from ..calibration.fingerprint import of_samples, of_versions
    from ..calibration.probe import Probe
    from ..calibration.profiles import Target
    from ..calibration.vision import Vision
    from ..patches.calibrated import of_weights
    from .log import Log

    target, shape, kind = Target.of(model), shape_of(model), cost_of(cost)
    if kind.tower and kind.counted is not None and shape.vision is None:
        raise PlanError(f"cost: got {cost}, whose vision encoder is not described for {shape.name}, expected another")
    vision = Vision.of(target) if kind.tower else None
    probe = Probe(target, samples, batch, vision)
    # rough measurements take every so manieth batch
    facts = {"weights": of_weights(model), "samples": of_samples(samples), "batch": str(batch)}
    known = Log(log, facts | of_versions())
    middle = middle_sample(probe)
    one = Probe(target, samples[middle : middle + 1], vision=vision)
    if kind.counted is None:
        from .layer_times import LayerTimes

        counted = LayerTimes(one, known)
    else:
        counted = partial(_count, kind, shape, one)
    return PlanLosses(probe, counted, known)


def _stages(budget: float) -> list[float]:
    """Halvings of the whole cost that are well above the budget, and the budget."""
    halvings = itertools.takewhile(lambda share: share > 1.4 * budget, (0.5**power for power in itertools.count(1)))
    return [*halvings, budget]


def _count(cost: Cost, shape: ModelShape, probe: Probe, plan: VisualPlan) -> int:
    """The cost of a plan for the one sample of a probe."""
    (layout,), (length,) = probe.layouts, probe.lengths
    report = flops(shape, plan, layout=layout, text_tokens=length - layout.num_visual)
    return cost.counted(report, tower_flops(shape.vision, plan.tower, probe.grids) if cost.tower else 0)


def _descend(meter, ladder, loss, point: Point, budget: float, end: float) -> Iterator[Point]:
    """From a point to the budget, each step the one that loses least for what it saves.

    The candidates are measured again from the most promising one until one stays in front.
    """
    meter.start_from(point.plan)

    def rough(plan: VisualPlan) -> float:
        return loss(meter(plan, rough=True))

    def rate(change: LayerChange) -> float:
        """Loss per share of the cost saved; infinite if nothing is saved."""
        candidate = with_layer(point.plan, *change)
        saved = point.cost - meter.cost(candidate)
        return max(rough(candidate) - rough(point.plan), _FREE) / saved if saved > 0 else float("inf")

    yield point
    numbers = itertools.count()
    queue = [(rate(change), next(numbers), change) for change in ladder.of(point.plan)]
    heapq.heapify(queue)
    while point.cost > budget:
        if not queue or queue[0][0] == float("inf"):
            raise PlanError(f"budget: got {budget}, expected at least {point.cost:.3f}, what the last step leaves")
        _, number, change = heapq.heappop(queue)
        if time.monotonic() < end:
            fresh = rate(change)
            if queue and fresh > queue[0][0]:
                heapq.heappush(queue, (fresh, number, change))
                continue
        point = meter(with_layer(point.plan, *change))
        meter.start_from(point.plan)
        yield point
        place = change[0]
        queue = [entry for entry in queue if entry[2][0] != place]
        again = ((place, layer) for layer in ladder.of_layer(point.plan, place))
        queue += [(rate(change), next(numbers), change) for change in again]
        heapq.heapify(queue)


def _exchange(meter, ladder, loss, point: Point, budget: float) -> Iterator[Point]:
    """From a plan within the budget to better ones within it, until a round finds none or one is as good as dense.

    A round measures the changes of the plan roughly, each alone, then the pairs of them that promise most if losses
    and costs add up, and all swaps of two layers; those that are better so are measured exactly, the best first.
    """
    better = True
    while better and loss(point) > _AS_DENSE:
        better, start = False, point
        meter.start_from(start.plan)
        changes = [*_pairs(meter, ladder, loss, start, budget), *ladder.swaps(start.plan)]
        for change in _promising(meter, loss, start, changes, budget):
            if all(layer_at(start.plan, place) == layer_at(point.plan, place) for place, _ in change):
                plan = _with_layers(point.plan, change)
                if meter.cost(plan) <= budget and loss(meter(plan)) < loss(point) - _FREE:
                    point, better = meter(plan), True
                    yield point


def _promising(
    meter, loss, start: Point, changes: Iterable[list[LayerChange]], budget: float
) -> list[list[LayerChange]]:
    """The changes to a plan that keep it within the budget and look better, the best first."""
    limit = loss(meter(start.plan, rough=True)) - _FREE
    plans = [_with_layers(start.plan, change) for change in changes]
    within = [(plan, change) for plan, change in zip(plans, changes) if meter.cost(plan) <= budget]
    rough = [(loss(meter(plan, rough=True)), change) for plan, change in within]
    return [change for _, change in sorted((each for each in rough if each[0] < limit), key=itemgetter(0))]


def _with_layers(plan: VisualPlan, together: Iterable[LayerChange]) -> VisualPlan:
    for change in together:
        plan = with_layer(plan, *change)
    return plan


def _pairs(meter, ladder, loss, start: Point, budget: float) -> Iterator[list[LayerChange]]:
    """Pairs of changes in two layers, and changes alone, of which the least loss is expected within the budget."""
    everything = list(ladder.of(start.plan))
    saved = np.array([start.cost - meter.cost(with_layer(start.plan, *change)) for change in everything])
    over = start.cost - budget
    possible = np.flatnonzero(saved + max(saved.max(), 0) >= over)
    everything = [everything[index] for index in possible]
    # the first entry is no change: a pair with it is a change alone
    saved = np.array([0.0, *saved[possible]])
    layers = np.array([-np.inf, *(place for place, _ in everything)])
    rough = (loss(meter(with_layer(start.plan, *change), rough=True)) for change in everything)
    lost = np.array([0.0, *rough])
    lost[1:] -= loss(meter(start.plan, rough=True))
    expected = lost[:, None] + lost
    expected[(saved[:, None] + saved < over) | (layers[:, None] >= layers)] = np.inf
    for index in np.argsort(expected, axis=None, kind="stable")[:_TRIES]:
        if expected.flat[index] < -_FREE:
            yield [everything[each - 1] for each in np.unravel_index(index, expected.shape) if each]
