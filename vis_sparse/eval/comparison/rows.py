"""Results as rows of numbers: what plans cost and answer, and plans against their rivals question by question."""

from __future__ import annotations

from collections.abc import Callable

from ...plans.plan import VisualPlan
from .answers import SCORED, Answers, Computed, computed
from .paired import holm, mcnemar, only_one_right
from .plans import Field


def scored(field: Field, given: dict[Computed, Answers], cost: Callable[[VisualPlan], float]) -> list[dict]:
    """What plans cost as a share of dense visual FLOPs, their shares of right answers, and KL to dense."""
    rows = []
    for name, plan in field.plans.items():
        own = given[computed(plan)]
        scores = {name: own.score(name) for name in SCORED}
        layers = [str(layer) for layer in plan.layers]
        tower = {"tower": [str(layer) for layer in plan.tower.layers]} if plan.tower else {}
        rows.append({"plan": name, "cost": cost(plan), **scores, "kl": own.kl, "layers": layers, **tower})
    return rows


def paired(field: Field, given: dict[Computed, Answers]) -> list[dict]:
    """Plans against each of their rivals on each kind of questions; p corrected for all comparisons of one plan."""
    return [row for plan in field.rivals for row in _against_rivals(field, plan, given)]


def _against_rivals(field: Field, plan: str, given: dict[Computed, Answers]) -> list[dict]:
    rows = []
    for rival in field.rivals[plan]:
        ours, theirs = (given[computed(field.plans[name])] for name in (plan, rival))
        for kind in SCORED:
            only = only_one_right(ours.to(kind), theirs.to(kind))
            rows.append({"plan": plan, "rival": rival, "kind": kind, "only_plan": only[0], "only_rival": only[1]})
    raw = [mcnemar(row["only_plan"], row["only_rival"]) for row in rows]
    return [row | {"p": p, "p_holm": corrected} for row, p, corrected in zip(rows, raw, holm(raw))]
