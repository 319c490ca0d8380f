"""Plans searched over vision encoder and decoder together against the same budgets spent on the decoder alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...calibration.profiles import Target
from ...calibration.vision import Vision
from ...patches import inspect, patched
from ...plans.layer_plan import LayerPlan
from ...plans.plan import VisualPlan
from ...searching.pareto import Point, described
from ...searching.search import best_within, meter_of, search_front
from .answers import answers
from .plans import BUDGETS, Field
from .rows import paired, scored
from .setup import Setup

_DECODER_BUDGET = 0.05  # of the decoder's visual FLOPs: as far down as the decoder alone is searched


def whole(setup: Setup) -> Iterator[dict]:
    """Budgets of all visual computation: searched, the decoder alone, and dense.

    The decoder alone has its plan of least KL within a budget, or, where none is, its cheapest one. Yields the result.
    """
    model, samples, log = setup.model, setup.samples, setup.file("-all.log")
    settings = {"calibration": setup.calibration, "time_limit": setup.time_limit}
    together = list(search_front(model, samples, budget=min(BUDGETS), cost="all", log=log, **settings))
    meter = meter_of(model, samples, "all", log=log)
    alone = search_front(model, samples, budget=_DECODER_BUDGET, log=setup.file("-decoder.log"), **settings)
    of_decoder = [_with_tower(point, meter.dense.tower, meter.cost) for point in alone]
    field = Field({"dense": meter.dense})
    for budget in BUDGETS:
        found, label = best_within(together, budget), f"{budget:.0%}"
        within = [point for point in of_decoder if point.cost <= budget]
        best = best_within(within, budget) if within else min(of_decoder, key=lambda point: point.cost)
        for kind, point in (("all", found), ("decoder", best)):
            setup.file(f"-{kind}-{label}.yaml").write_text(described(point, "all").to_yaml())
        field.add(label, ("searched", found.plan), {"decoder alone": best.plan})
        field.rivals[f"{label}: searched"].append("dense")
    yield {"floor of the decoder alone": meter.cost(_silent(meter.dense)), "budgets": _asked(setup, field, meter.cost)}


def named(setup: Setup, names: list[str]) -> dict:
    """Plans by name, budgets resolved by the calibration, each against dense; costs are of all visual computation."""
    meter = meter_of(setup.model, setup.samples[:1], "all")
    field = Field({"dense": meter.dense})
    for name in names:
        with patched(setup.model, name, calibration=setup.calibration):
            field.plans[name], field.rivals[name] = inspect(setup.model)["plan"], ["dense"]
    return {"budgets": _asked(setup, field, meter.cost)}


def _asked(setup: Setup, field: Field, cost: Callable[[VisualPlan], float]) -> dict:
    target = Target.of(setup.model)
    given = answers(target, setup.processor, field.plans.values(), setup.asked, setup.on_step, Vision.of(target))
    return {"questions": setup.asked, "plans": scored(field, given, cost), "pairs": paired(field, given)}


def _with_tower(point: Point, tower: VisualPlan, cost: Callable[[VisualPlan], float]) -> Point:
    """A point of the decoder alone as a share of all visual computation."""
    plan = point.plan.replace(tower=tower)
    return Point(plan, cost(plan), point.kl, point.accuracy)


def _silent(dense: VisualPlan) -> VisualPlan:
    """What the decoder alone can never be below: visual rows that compute nothing in it."""
    return dense.replace(layers=(LayerPlan.off(),) * dense.num_layers)
