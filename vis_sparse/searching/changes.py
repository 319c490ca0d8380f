"""The ways to change one layer of a plan: every field to every value of its ladder, up or down."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from ..plans.layer_plan import HeadBudget, LayerPlan, Neighborhood
from ..plans.plan import VisualPlan
from ..plans.scores import keep_heads

SHARES = (0.75, 0.5, 0.25, 0.125)  # of heads and of neurons
# windows are causal: those that read ahead show unmodified weights what they have never seen
ATTENTION = ("full", *(Neighborhood(radius, "causal") for radius in (3, 2, 1)), "none")
_WORK = ("attention", "heads", "ffn")
_READS = ("text_reads",)
_APART = 4  # layers that change places, at most: so many more swaps for a deeper model, not their square

LayerChange = tuple[int, LayerPlan]  # a layer's index, and what it becomes


class LayerChanges:
    """Changes of any plan for a model; heads and neurons are kept in the order of a calibration's scores."""

    def __init__(self, calibration, num_kv_heads: int):
        self._calibration, self._num_kv_heads = calibration, num_kv_heads
        budgets = [HeadBudget(share) for share in SHARES]
        masks = [keep_heads(calibration.heads, budget, num_kv_heads).tolist() for budget in budgets]
        self._heads = [(None, *(tuple(mask[index]) for mask in masks)) for index in range(len(calibration.heads))]
        self._ffn = [
            (1.0, *(_most_important(row, int(share * len(row))) for share in SHARES), 0.0)
            for row in calibration.neurons
        ]

    def of(self, plan: VisualPlan) -> Iterator[LayerChange]:
        """The changes of every layer."""
        return ((index, layer) for index in range(plan.num_layers) for layer in self.of_layer(plan, index))

    def of_layer(self, plan: VisualPlan, index: int) -> Iterator[LayerPlan]:
        """Layer `index` of the plan with one field changed; frozen, whole, or off."""
        layer = plan.layers[index]
        changes = [{"attention": value} for value in ATTENTION]
        changes += [{"ffn": value} for value in self._ffn[index]]
        changes += [{"heads": value} for value in self._heads[index]]
        changes += [{"text_reads": not layer.text_reads}]
        changes += [{"attention": "none", "ffn": 0.0}, {"attention": "full", "ffn": 1.0}]
        changed = (dataclasses.replace(layer, **change) for change in changes)
        return (new for new in dict.fromkeys([*changed, LayerPlan(), LayerPlan.off()]) if new != layer)

    def swaps(self, plan: VisualPlan) -> Iterator[list[LayerChange]]:
        """Two near layers that change places: in what visual tokens compute, in whether text reads them, in both.

        Either change alone may be ruinous (the only layer where text reads) and the two together a gain.
        """
        pairs = itertools.combinations(range(plan.num_layers), 2)
        for first, second in ((low, high) for low, high in pairs if high - low <= _APART):
            for names in (_WORK, _READS, _WORK + _READS):
                swap = [self._like(plan, *pair, names) for pair in ((first, second), (second, first))]
                if any(plan.layers[index] != layer for index, layer in swap):
                    yield swap

    def _like(self, plan: VisualPlan, index: int, other: int, names: tuple[str, ...]) -> LayerChange:
        """Layer `index` with the named fields of layer `other`: as many heads and neurons, its own best ones."""
        model = plan.layers[other]
        fields = {name: getattr(model, name) for name in names}
        if isinstance(fields.get("heads"), tuple):
            scores, budget = self._calibration.heads[index : index + 1], HeadBudget(sum(model.heads))
            fields["heads"] = tuple(keep_heads(scores, budget, self._num_kv_heads)[0].tolist())
        if isinstance(fields.get("ffn"), tuple):
            neurons = self._calibration.neurons[index]
            fields["ffn"] = _most_important(neurons, len(model.ffn))
        return index, dataclasses.replace(plan.layers[index], **fields)


def _most_important(neurons: np.ndarray, count: int) -> tuple[int, ...]:
    return tuple(sorted(np.argsort(-neurons, kind="stable")[:count].tolist()))
