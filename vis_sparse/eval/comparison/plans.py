"""The plans that are compared, by name, and which of them are rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ...plans.budgets import resolve_heads
from ...plans.layer_plan import HeadBudget, LayerPlan, NeuronBudget
from ...plans.plan import VisualPlan, mask_plan
from ...plans.scores import Calibration, keep_heads

BUDGETS = (0.5, 0.25, 0.12)
KEPT = 0.25  # of heads
NEURONS = (0.25, 0.12, 0.06, 0.03)
SEEDS = 5


@dataclass
class Field:
    """Plans by name. rivals: names by the name of the plan that should do no worse than any of them."""

    plans: dict[str, VisualPlan] = field(default_factory=dict)
    rivals: dict[str, list[str]] = field(default_factory=dict)

    def add(self, group: str, ours: tuple[str, VisualPlan], theirs: dict[str, VisualPlan]) -> None:
        """A plan of ours and its rivals, under `group` and their own names."""
        name, plan = ours
        self.plans[f"{group}: {name}"] = plan
        self.plans |= {f"{group}: {rival}": plan for rival, plan in theirs.items()}
        self.rivals[f"{group}: {name}"] = [f"{group}: {rival}" for rival in theirs]


def add_heads(field: Field, calibration: Calibration) -> None:
    """Masks that keep a quarter of all heads, in each layer as many as the calibrated mask keeps there; "inverted"
    keeps the worst quarter of the model."""
    dense, scores = VisualPlan.dense(len(calibration.heads)), calibration.heads
    best, worst = (keep_heads(rank, HeadBudget(KEPT, over="model"), scores.shape[1]) for rank in (scores, -scores))

    def like(other: np.ndarray) -> VisualPlan:
        rows = (keep_heads(row[None], HeadBudget(int(n)), len(row))[0] for row, n in zip(other, best.sum(1)))
        return mask_plan(dense, [row.tolist() for row in rows])

    rng = np.random.default_rng(0)
    others = {f"random {seed}": like(rng.random(scores.shape)) for seed in range(SEEDS)}
    others |= {"attention mass": like(calibration.mass), "worst in each layer": like(-scores)}
    others["inverted"] = mask_plan(dense, worst.tolist())
    field.add("heads", ("calibrated", mask_plan(dense, best.tolist())), others)


def add_neurons(field: Field, calibration: Calibration) -> None:
    """A share of the FFN neurons of every layer, the most important ones against the first ones; and none."""
    layers, heads = calibration.heads.shape
    for share in NEURONS:
        plan = VisualPlan((LayerPlan(ffn=NeuronBudget(share)),) * layers)
        best, first = (resolve_heads(plan, heads, heads, *of) for of in ((None, calibration), ("first",)))
        field.add(f"neurons {share:.0%}", ("calibrated", best), {"first": first})
    field.plans["neurons 0%"] = VisualPlan((LayerPlan(ffn=0.0),) * layers)


def add_budget(
    field: Field,
    budget: float,
    found: VisualPlan,
    methods: dict[str, list[VisualPlan]],
    cost: Callable[[VisualPlan], float],
    loss: Callable[[VisualPlan], float],
) -> None:
    """The searched plan of a budget against the published methods, each with its plan of least loss within the budget,
    or its cheapest one where none is. loss: on the samples that the search had."""
    theirs = {}
    for name, chain in methods.items():
        within = [plan for plan in chain if cost(plan) <= budget]
        theirs[name] = min(within, key=loss) if within else min(chain, key=cost)
    field.add(f"{budget:.0%}", ("searched", found), theirs)
