"""What a plan leaves of a prompt's visual work, as plain data that travels with results: `report` needs no model."""

from __future__ import annotations

from ..cost.report import CostReport
from ..plans.plan import VisualPlan


def plan_strip(plan: VisualPlan, cost: CostReport, dense: CostReport) -> dict:
    """{about, visual_tokens and text_tokens of a sample, share of the dense plan's visual FLOPs, by layer too, and
    reads: whether text reads visual tokens there}. cost, dense: of the plan and the dense plan on the same prompt."""
    layers = zip(cost.prefill.layers, dense.prefill.layers, strict=True)
    return {
        "about": plan.about,
        "visual_tokens": cost.visual_tokens // cost.batch,
        "text_tokens": cost.text_tokens // cost.batch,
        "share": cost.prefill.lane("visual") / dense.prefill.lane("visual"),
        "shares": [layer.visual.total / whole.visual.total for layer, whole in layers],
        "reads": [layer.text_reads for layer in plan.layers],
    }
