"""The ways to change one layer of a plan: every field to every value of its ladder, up or down.

A layer is known by its place, as `with_layer` has it: below 0 those of the vision encoder.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..plans.layer_plan import HeadBudget, LayerPlan, Neighborhood, TokenBudget
from ..plans.plan import VisualPlan, layer_at
from ..plans.scores import Calibration, TowerScores, keep_heads

SHARES = (0.75, 0.5, 0.25, 0.125)  # of heads and of neurons
# windows are causal: those that read ahead show unmodified weights what they have never seen
ATTENTION = ("full", *(Neighborhood(radius, "causal") for radius in (3, 2, 1)), "none")
# patches have no order; aligned windows read as little as neighbours do, and quicker
TOWER_ATTENTION = (
    "full",
    *(Neighborhood(radius, "both") for radius in (4, 2, 1)),
    *(Neighborhood(0, "both", stride=side) for side in (8, 4)),
    "none",
)
TOWER_TOKENS = (None, *(TokenBudget(share, by) for by in ("norm", "uniform") for share in (0.5, 0.25)))
_WORK = ("attention", "heads", "ffn")
_READS = ("text_reads",)
_EVERYTHING = tuple(field.name for field in dataclasses.fields(LayerPlan))
_APART = 4  # layers that change places, at most: so many more swaps for a deeper model, not their square

LayerChange = tuple[int, LayerPlan]  # a layer's place, and what it becomes


@dataclass(frozen=True)
class _Layers:
    """Layers of one kind. attention, tokens: what they may become. reads: whether somebody may do without reading
    them. swaps: fields that change places together."""

    scores: Calibration | TowerScores
    num_kv_heads: int
    attention: tuple
    tokens: tuple
    reads: bool
    swaps: tuple[tuple[str, ...], ...]

    def heads(self, index: int, keep: int | float) -> tuple[bool, ...]:
        """A layer's best heads, a share of them or so many."""
        scores = self.scores.heads[index : index + 1]
        return tuple(keep_heads(scores, HeadBudget(keep), self.num_kv_heads)[0].tolist())

    def neurons(self, index: int, count: int) -> tuple[int, ...]:
        """A layer's most important neurons."""
        return tuple(sorted(np.argsort(-self.scores.neurons[index], kind="stable")[:count].tolist()))


class LayerChanges:
    """Changes of any plan for a model; heads and neurons are kept in the order of a calibration's scores.

    with_tower: also of the vision encoder's layers, which the calibration has scores of.
    """

    def __init__(self, calibration: Calibration, num_kv_heads: int, with_tower: bool = False):
        decoder = _Layers(calibration, num_kv_heads, ATTENTION, (None,), True, (_WORK, _READS, _WORK + _READS))
        kinds = [(range(len(calibration.heads)), decoder)]
        if with_tower:
            layers, heads = calibration.tower.heads.shape
            encoder = _Layers(calibration.tower, heads, TOWER_ATTENTION, TOWER_TOKENS, False, (_EVERYTHING,))
            kinds = [(range(-layers, 0), encoder), *kinds]
        self._kinds = kinds
        self._of = {place: (kind, index) for places, kind in kinds for index, place in enumerate(places)}
        self._ladders = {place: _ladder(*of) for place, of in self._of.items()}

    def of(self, plan: VisualPlan) -> Iterator[LayerChange]:
        """The changes of every layer."""
        return ((place, layer) for place in self._of for layer in self.of_layer(plan, place))

    def of_layer(self, plan: VisualPlan, place: int) -> Iterator[LayerPlan]:
        """The layer at a place with one field changed; frozen, whole, or off."""
        layer, (kind, _) = layer_at(plan, place), self._of[place]
        # a layer of the encoder is off as a whole: what comes after that is the whole layer with one field changed
        start = LayerPlan() if layer == LayerPlan.off() and not kind.reads else layer
        changes = [{name: value} for name, values in self._ladders[place].items() for value in values]
        changes += [{"text_reads": not layer.text_reads}] if kind.reads else []
        changes += [{"attention": "none", "ffn": 0.0}, {"attention": "full", "ffn": 1.0}]
        changed = (dataclasses.replace(start, **change) for change in changes)
        return (new for new in dict.fromkeys([*changed, LayerPlan(), LayerPlan.off()]) if new != layer)

    def swaps(self, plan: VisualPlan) -> Iterator[list[LayerChange]]:
        """Two near layers that change places: in what visual tokens compute, in whether text reads them, in both.

        Either change alone may be ruinous (the only layer where text reads) and the two together a gain.
        """
        for places, kind in self._kinds:
            pairs = itertools.combinations(places, 2)
            for first, second in ((low, high) for low, high in pairs if high - low <= _APART):
                for names in kind.swaps:
                    swap = [self._like(plan, *pair, names) for pair in ((first, second), (second, first))]
                    if any(layer_at(plan, place) != layer for place, layer in swap):
                        yield swap

    def _like(self, plan: VisualPlan, place: int, other: int, names: tuple[str, ...]) -> LayerChange:
        """The layer at a place with the named fields of another: as many heads and neurons, its own best ones."""
        (kind, index), model = self._of[place], layer_at(plan, other)
        fields = {name: getattr(model, name) for name in names}
        if isinstance(fields.get("heads"), tuple):
            fields["heads"] = kind.heads(index, sum(model.heads))
        if isinstance(fields.get("ffn"), tuple):
            fields["ffn"] = kind.neurons(index, len(model.ffn))
        return place, dataclasses.replace(layer_at(plan, place), **fields)


class WholeLayers(LayerChanges):
    """Whole layers only, step by step: as they are, standing still, off. For a deep model, where the first ranking of
    all fields takes too long."""

    steps = (LayerPlan(), LayerPlan(attention="none", ffn=0.0), LayerPlan.off())

    def of_layer(self, plan: VisualPlan, place: int) -> Iterator[LayerPlan]:
        at = self.steps.index(layer_at(plan, place))
        return iter(self.steps[max(0, at - 1) : at] + self.steps[at + 1 : at + 2])


def _ladder(kind: _Layers, index: int) -> dict[str, tuple]:
    """What each field of a layer may become."""
    neurons = kind.scores.neurons.shape[1]
    return {
        "attention": kind.attention,
        "ffn": (1.0, *(kind.neurons(index, int(share * neurons)) for share in SHARES), 0.0),
        "heads": (None, *(kind.heads(index, share) for share in SHARES)),
        "tokens": kind.tokens,
    }
