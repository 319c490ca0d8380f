"""Plans before the model's depth is known: entries for ranges of layers, by index or by depth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .plan import LayerPlan, PlanError, VisualPlan


@dataclass(frozen=True, slots=True)
class PlanRecipe:
    """A plan file before the model's depth is known.

    entries: (layer range, changes) pairs in file order. A range is an index ("4"), indices ("2-15", inclusive), a
    depth range ("50%-100%": the layers l with 0.5 <= l/L < 1), one with an open end ("2-"), or the last layer before a
    depth ("<50%"). Changes are LayerPlan fields laid over what the earlier entries gave, or a whole LayerPlan (for
    "off").
    """

    name: str
    about: str = ""
    semantics: str = "exclude"
    default: LayerPlan = LayerPlan()
    entries: tuple[tuple[str, Mapping | LayerPlan], ...] = field(default=())
    num_layers: int | None = None

    def resolve(self, num_layers: int | None = None) -> VisualPlan:
        """The plan for a model of `num_layers` decoder layers."""
        if num_layers is None:
            num_layers = self.num_layers
        if num_layers is None:
            raise PlanError(f"plan {self.name!r}: num_layers is needed, its file states none")
        if self.num_layers not in (None, num_layers):
            raise PlanError(f"plan {self.name!r}: got {self.num_layers} layers, expected the model's {num_layers}")
        layers = [self.default] * num_layers
        for spec, changes in self.entries:
            try:
                for index in layer_range(spec, num_layers):
                    if isinstance(changes, LayerPlan):
                        layers[index] = changes
                    else:
                        layers[index] = dataclasses.replace(layers[index], **changes)
            except PlanError as error:
                raise PlanError(f"plan {self.name!r}: {error}") from None
        return VisualPlan(tuple(layers), self.name, self.about, self.semantics)


def layer_range(spec: str, num_layers: int) -> range:
    """The layers that `spec` names in a model of `num_layers` layers (see `PlanRecipe`).

    Indices must exist in the model; an open end stops at the last layer. Depth ranges are half open.
    """
    start_text, dash, end_text = spec.partition("-")
    try:
        if spec.startswith("<"):
            end = math.ceil(_depth(spec[1:], 0.0) * num_layers - 1e-6)
            if not 0 < end <= num_layers:
                raise ValueError
            return range(end - 1, end)
        if "%" in spec:
            start, end = _depth(start_text, 0.0), _depth(end_text, 1.0) if dash else None
            if end is None or not 0 <= start <= end <= 1:
                raise ValueError
            # l / L compared with a tolerance, so that 21.875 % of 32 is layer 7 whatever the division gives
            first, last = (math.ceil(bound * num_layers - 1e-6) for bound in (start, end))
            return range(first, last)
        start = int(start_text) if start_text or not dash else 0
        end = start if not dash else (int(end_text) if end_text else max(num_layers - 1, start))
        if not 0 <= start <= end:
            raise ValueError
    except ValueError:
        raise PlanError(
            f"layers: got range {spec!r}, expected like 4, 2-15, 2-, 50%-100%, 50%- or <50% in ascending order"
        ) from None
    if end >= num_layers:
        raise PlanError(f"layers: got range {spec!r}, expected layers 0 to {num_layers - 1}")
    return range(start, end + 1)


def _depth(text: str, default: float) -> float:
    if not text:
        return default
    if not text.endswith("%"):
        raise ValueError
    return float(text[:-1]) / 100
