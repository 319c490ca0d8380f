"""The ways to change one layer of a plan: every field to every value of its ladder, up or down."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from ..heads import keep_heads
from ..plan import HeadBudget, LayerPlan, Neighborhood, VisualPlan

SHARES = (0.75, 0.5, 0.25, 0.125)  # of heads and of neurons
# windows are causal: those that read ahead show unmodified weights what they have never seen
ATTENTION = ("full", *(Neighborhood(radius, "causal") for radius in (3, 2, 1)), "none")


class Moves:
    """Moves from any plan for a model; heads and neurons are kept in the order of a calibration's scores."""

    def __init__(self, calibration, num_kv_heads: int):
        budgets = [HeadBudget(share) for share in SHARES]
        masks = [keep_heads(calibration.heads, budget, num_kv_heads).tolist() for budget in budgets]
        self._heads = [(None, *(tuple(mask[index]) for mask in masks)) for index in range(len(calibration.heads))]
        self._ffn = [(1.0, *(_most_important(row, share) for share in SHARES), 0.0) for row in calibration.neurons]

    def of(self, plan: VisualPlan) -> Iterator[tuple[int, LayerPlan]]:
        """(layer's index, what it may become) for every layer."""
        return ((index, layer) for index in range(plan.num_layers) for layer in self.of_layer(plan, index))

    def of_layer(self, plan: VisualPlan, index: int) -> Iterator[LayerPlan]:
        """Layer `index` of the plan with one field changed; frozen, whole, or off."""
        layer = plan.layers[index]
        changes = [{"attention": value} for value in ATTENTION]
        changes += [{"ffn": value} for value in self._ffn[index]]
        changes += [{"heads": value} for value in self._heads[index]]
        changes += [{"text_reads": not layer.text_reads}]
        changes += [{"attention": "none", "ffn": 0.0}, {"attention": "full", "ffn": 1.0}]
        moved = (dataclasses.replace(layer, **change) for change in changes)
        return (new for new in dict.fromkeys([*moved, LayerPlan(), LayerPlan.off()]) if new != layer)


def _most_important(neurons: np.ndarray, share: float) -> tuple[int, ...]:
    return tuple(sorted(np.argsort(-neurons, kind="stable")[: int(share * len(neurons))].tolist()))
