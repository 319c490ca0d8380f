"""Plans: what visual tokens compute, layer by layer. Every published method of this kind is one and nothing more.

A YAML file may speak of layers by depth, so it is first a `PlanRecipe`, which `resolve(num_layers)` turns into a plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import yaml_format
from .before import TokensBefore
from .layer_plan import (
    HeadBudget,
    LayerPlan,
    Neighborhood,
    NeuronBudget,
    PlanError,
    TokenBudget,
    brief,
    check_int,
    is_number,
)
from .layer_range import layer_range
from .tower import check_tower_layer

SEMANTICS = ("exclude", "zero")


MOST_LAYERS = 10_000  # what no model has


def _check_depth(num_layers) -> None:
    check_int("num_layers", num_layers, 1)
    if num_layers > MOST_LAYERS:
        raise PlanError(f"num_layers: got {brief(num_layers)}, expected at most {MOST_LAYERS}")


def _check_cut(name: str, layer, num_layers: int) -> None:
    _check_depth(num_layers)
    check_int(name, layer, 0)
    if layer > num_layers:
        raise PlanError(f"{name}: got {brief(layer)}, expected a layer from 0 to the model's {num_layers}")


@dataclass(frozen=True, slots=True)
class VisualPlan:
    """One `LayerPlan` a decoder layer, with a name, its source (`about`) and the softmax `semantics`.

    semantics "exclude": softmax runs over what is read, nothing else exists. "zero": the official code's arithmetic
    (arXiv 2410.06169), in which unread visual keys stay in the softmax's denominator and visual rows go on to the end.
    tower: what patches compute in the vision encoder (docs/tower.md), a plan of its layers or a recipe of one, whose
    name becomes "tower"; None: the encoder is the unpatched model's. before: which visual tokens come into the decoder;
    None (also for a share of 1): all.
    """

    layers: tuple[LayerPlan, ...]
    name: str = "custom"
    about: str = ""
    semantics: str = "exclude"
    tower: VisualPlan | PlanRecipe | None = None
    before: TokensBefore | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or not all(isinstance(layer, LayerPlan) for layer in self.layers):
            raise PlanError("layers: expected one LayerPlan a decoder layer, at least one")
        if not isinstance(self.semantics, str) or self.semantics not in SEMANTICS:
            raise PlanError(f"semantics: got {brief(self.semantics)}, expected one of {', '.join(SEMANTICS)}")
        object.__setattr__(self, "before", _checked_before(self.before, self.semantics))
        self._check_tokens()
        object.__setattr__(self, "tower", _checked_tower(self.tower))

    def _check_tokens(self) -> None:
        budgets = [(index, layer.tokens) for index, layer in enumerate(self.layers) if layer.tokens]
        if budgets and self.semantics == "zero":
            raise PlanError(
                f"layer {budgets[0][0]}: tokens: got a share to keep under semantics 'zero', expected 'exclude' "
                "(in the official arithmetic every visual row goes on to the end)"
            )
        for index, budget in budgets if self.before else budgets[1:]:
            if budget.by == "stride":
                where = "before the decoder" if self.before else f"in layer {budgets[0][0]}"
                raise PlanError(
                    f"layer {index}: tokens.by: got stride after tokens left {where}, expected whole grids (stride may "
                    "only come first)"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def is_dense(self) -> bool:
        return self.before is None and all(layer.is_dense for layer in self.layers)

    def replace(self, **changes: Any) -> VisualPlan:
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)

    def check_fits(self, num_layers: int, num_heads: int, ffn_size: int) -> None:
        """Raise `PlanError` naming the field if the plan does not fit a model of these sizes."""
        if self.num_layers != num_layers:
            raise PlanError(f"plan {self.name!r}: got {self.num_layers} layers, expected the model's {num_layers}")
        for index, layer in enumerate(self.layers):
            try:
                if isinstance(layer.ffn, NeuronBudget):
                    layer.ffn.count(ffn_size)
                else:
                    layer.neurons(ffn_size)
                if isinstance(layer.heads, HeadBudget):
                    layer.heads.count(num_heads)
            except PlanError as error:
                raise PlanError(f"plan {self.name!r}, layer {index}: {error}") from None
            if isinstance(layer.heads, tuple) and len(layer.heads) != num_heads:
                raise PlanError(
                    f"plan {self.name!r}, layer {index}: heads: got a mask of {len(layer.heads)}, "
                    f"expected the model's {num_heads} heads"
                )

    # The published methods, by their settings.

    @classmethod
    def dense(cls, num_layers: int) -> VisualPlan:
        """Every layer as in the unpatched model."""
        _check_depth(num_layers)
        return cls((LayerPlan(),) * num_layers, name="dense", about="the unpatched model's computation")

    @classmethod
    def yopo(
        cls,
        num_layers: int,
        window: int = 5,
        layer_cut: int | None = None,
        head_mask: Sequence[Sequence[bool]] | None = None,
        ffn_ratio: float = 1,
        semantics: str = "exclude",
    ) -> VisualPlan:
        """The official settings of arXiv 2410.06169.

        window: side of the neighbourhood in tokens (an even side equals the next smaller odd one). layer_cut: first
        layer in which text no longer reads visual tokens. head_mask: bool (num_layers, heads), True = active.
        ffn_ratio: visual rows use the first int(size / ffn_ratio) neurons.
        """
        check_int("window", window, 1)
        if not is_number(ffn_ratio) or not ffn_ratio >= 1:
            raise PlanError(f"ffn_ratio: got {brief(ffn_ratio)}, expected a number >= 1")
        if head_mask is not None and len(head_mask) != num_layers:
            raise PlanError(f"head_mask: got {len(head_mask)} layers, expected {num_layers}")
        cut = num_layers if layer_cut is None else layer_cut
        _check_cut("layer_cut", cut, num_layers)
        near = Neighborhood((window - 1) // 2, "both")
        layers = (
            LayerPlan(i < cut, near, None if head_mask is None else tuple(map(bool, head_mask[i])), 1 / ffn_ratio)
            for i in range(num_layers)
        )
        return cls(tuple(layers), "yopo", "arXiv 2410.06169, official settings", semantics)

    @classmethod
    def vtw(cls, num_layers: int, drop_layer: int) -> VisualPlan:
        """VTW: visual tokens leave the network at `drop_layer`."""
        _check_cut("drop_layer", drop_layer, num_layers)
        layers = (LayerPlan() if i < drop_layer else LayerPlan.off() for i in range(num_layers))
        return cls(tuple(layers), "vtw", "VTW: visual tokens withdrawn at one layer")

    @classmethod
    def vica(cls, num_layers: int, read_layers: Iterable[int]) -> VisualPlan:
        """ViCA (arXiv 2602.07574): visual rows frozen everywhere, text reads them in `read_layers`."""
        reads = _layer_set(read_layers, num_layers)
        layers = (LayerPlan(i in reads, "none", None, 0.0) for i in range(num_layers))
        return cls(tuple(layers), "vica", "ViCA, arXiv 2602.07574")

    @classmethod
    def shortv(cls, num_layers: int, frozen_layers: Iterable[int]) -> VisualPlan:
        """ShortV (ICCV 2025): visual rows frozen in `frozen_layers`, still read there."""
        frozen = _layer_set(frozen_layers, num_layers)
        layers = (LayerPlan(True, "none", None, 0.0) if i in frozen else LayerPlan() for i in range(num_layers))
        return cls(tuple(layers), "shortv", "ShortV, ICCV 2025")

    @classmethod
    def vskip(cls, num_layers: int, skip_layers: Iterable[int]) -> VisualPlan:
        """V-Skip (arXiv 2606.08511): visual self-attention skipped in `skip_layers`, FFN kept."""
        skipped = _layer_set(skip_layers, num_layers)
        layers = (LayerPlan(attention="none") if i in skipped else LayerPlan() for i in range(num_layers))
        return cls(tuple(layers), "vskip", "V-Skip, arXiv 2606.08511")

    @classmethod
    def fastv(cls, num_layers: int, after: int = 2, keep: float = 0.5, by: str = "attention") -> VisualPlan:
        """FastV (arXiv 2403.06764): the share `keep` of the visual tokens goes on after `after` layers, the paper's K.

        As in the official code, the scores are the attention from the last text row in layer `after` - 1, counted from
        0, mean over the heads, and the others are gone from layer `after` on. by: another order, to compare with.
        """
        check_int("after", after, 1)
        _check_cut("after", after, num_layers)
        layers = (LayerPlan(tokens=TokenBudget(keep, by) if i == after - 1 else None) for i in range(num_layers))
        return cls(tuple(layers), "fastv", "FastV, arXiv 2403.06764")

    @classmethod
    def pyramiddrop(cls, num_layers: int, keep: float = 0.5, stages: int = 4) -> VisualPlan:
        """PyramidDrop (arXiv 2410.17247): between `stages` equal parts of the depth, `keep` of what is left goes on.

        The scores are those of the layer before each cut; the official code takes the query and key weights of the
        layer behind it.
        """
        check_int("stages", stages, 1)
        _check_cut("stages", stages, num_layers)
        ends = {math.ceil(num_layers * stage / stages) - 1 for stage in range(1, stages)}
        layers = (LayerPlan(tokens=TokenBudget(keep) if i in ends else None) for i in range(num_layers))
        return cls(tuple(layers), "pyramiddrop", "PyramidDrop, arXiv 2410.17247")

    @classmethod
    def from_yaml(cls, source: str | Path, num_layers: int | None = None) -> VisualPlan:
        """The plan of a YAML file or text. `num_layers` is needed when the file does not state its own."""
        return read_recipe(source).resolve(num_layers)

    def to_yaml(self) -> str:
        """The plan as YAML text; `from_yaml` of it gives an equal plan."""
        return yaml_format.write(self)

    def as_recipe(self) -> PlanRecipe:
        """The recipe that gives this plan, for a model of its depth alone."""
        entries = tuple((str(index), layer) for index, layer in enumerate(self.layers))
        sizes = {"num_layers": self.num_layers, "tower": self.tower, "before": self.before}
        return PlanRecipe(self.name, self.about, self.semantics, entries=entries, **sizes)


def _layer_set(layers: Iterable[int], num_layers: int) -> frozenset[int]:
    _check_depth(num_layers)
    chosen = tuple(layers)
    for index in chosen:
        if type(index) is not int or not 0 <= index < num_layers:
            raise PlanError(f"layers: got layer {brief(index)}, expected 0 to {num_layers - 1}")
    return frozenset(chosen)


def mask_plan(plan: VisualPlan, masks: Sequence[Sequence[bool]]) -> VisualPlan:
    """`plan` with the active heads of every layer set by `masks`, bool (layers, heads)."""
    if len(masks) != plan.num_layers:
        raise PlanError(f"heads: got masks for {len(masks)} layers, expected {plan.num_layers}")
    pairs = zip(plan.layers, masks, strict=True)
    layers = (dataclasses.replace(layer, heads=tuple(map(bool, mask))) for layer, mask in pairs)
    return plan.replace(layers=tuple(layers))


def layer_at(plan: VisualPlan, place: int) -> LayerPlan:
    """A decoder layer by its index; a layer of the tower's plan by an index below 0, the last one -1."""
    return plan.layers[place] if place >= 0 else plan.tower.layers[place]


def with_layer(plan: VisualPlan, place: int, layer: LayerPlan) -> VisualPlan:
    """`plan` with the layer at a place (`layer_at`) replaced."""
    if place < 0:
        return plan.replace(tower=with_layer(plan.tower, plan.tower.num_layers + place, layer))
    return plan.replace(layers=(*plan.layers[:place], layer, *plan.layers[place + 1 :]))


@dataclass(frozen=True, slots=True)
class PlanRecipe:
    """A plan file before the model's depth is known.

    entries: (layer range, changes) pairs in file order. A range is an index ("4"), indices ("2-15", inclusive), a
    depth range ("50%-100%": the layers l with 0.5 <= l/L < 1), one with an open end ("2-"), or the last layer before a
    depth ("<50%"). Changes are LayerPlan fields laid over what the earlier entries gave, or a whole LayerPlan (for
    "off"). tower, before: as a `VisualPlan` has them.
    """

    name: str
    about: str = ""
    semantics: str = "exclude"
    default: LayerPlan = LayerPlan()
    entries: tuple[tuple[str, Mapping[str, Any] | LayerPlan], ...] = field(default=())
    num_layers: int | None = None
    tower: VisualPlan | PlanRecipe | None = None
    before: TokensBefore | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tower", _checked_tower(self.tower))
        object.__setattr__(self, "before", _checked_before(self.before, self.semantics))

    def whole_first(self, count: int) -> PlanRecipe:
        """The same plan with its first `count` layers whole: every head, full attention, the whole FFN, read by text.

        Tokens leave where they did. Its name is this one's with `+count` behind it, as `load_plan` takes it.
        """
        check_int("whole_first", count, 1, MOST_LAYERS)
        changes = {name: getattr(LayerPlan(), name) for name in ("text_reads", "attention", "heads", "ffn")}
        about = f"{self.about} The first {count} layers whole.".strip()
        entries = (*self.entries, (f"0-{count - 1}", changes))
        return dataclasses.replace(self, name=f"{self.name}+{count}", about=about, entries=entries)

    def resolve(self, num_layers: int | None = None) -> VisualPlan:
        """The plan for a model of `num_layers` decoder layers."""
        if num_layers is None:
            num_layers = self.num_layers
        if num_layers is None:
            raise PlanError(f"plan {self.name!r}: num_layers is needed, its file states none")
        _check_depth(num_layers)
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
        return VisualPlan(tuple(layers), self.name, self.about, self.semantics, self.tower, self.before)


def _checked_before(before, semantics: str) -> TokensBefore | None:
    if not isinstance(before, TokensBefore | None):
        raise PlanError(f"before: got {brief(before)}, expected {{keep: share, by: order}} or {{by: duplicate}}")
    if before is None or before.keep == 1:
        return None
    if semantics == "zero":
        raise PlanError(
            f"before: got {before.to_data()} under semantics 'zero', expected 'exclude' (in the official "
            "arithmetic every visual row goes on to the end)"
        )
    return before


def _checked_tower(tower):
    """`tower` under the name that errors call it by. Raises PlanError for what is no plan of an encoder's layers."""
    if tower is None:
        return None
    if not isinstance(tower, VisualPlan | PlanRecipe) or not _may_be_tower(tower):
        raise PlanError(
            f"tower: got {brief(tower)}, expected a plan or a recipe for the encoder's layers, of semantics 'exclude' "
            "and without a tower of its own or tokens that leave before it"
        )
    if isinstance(tower, VisualPlan):
        named = list(enumerate(tower.layers))
    else:
        whole = (changes if isinstance(changes, LayerPlan) else LayerPlan(**changes) for _, changes in tower.entries)
        named = [("default", tower.default), *zip((spec for spec, _ in tower.entries), whole)]
    for where, layer in named:
        try:
            check_tower_layer(layer)
        except PlanError as error:
            raise PlanError(f"tower: layers {where}: {error}") from None
    return dataclasses.replace(tower, name="tower", about="")


def _may_be_tower(plan: VisualPlan | PlanRecipe) -> bool:
    return plan.tower is None and plan.before is None and plan.semantics == "exclude"


def recipe_of(fields: Mapping[str, Any]) -> PlanRecipe:
    """The recipe of what `yaml_format.read_fields` gives."""
    tower = fields.get("tower")
    if tower is not None:
        tower = PlanRecipe("tower", **tower)
        tower = tower if tower.num_layers is None else tower.resolve()
    return PlanRecipe(**{**fields, "tower": tower})


def read_recipe(source: str | Path) -> PlanRecipe:
    """The recipe in a YAML file (a `Path`, or a string that names a file) or in YAML text."""
    fields, origin = yaml_format.read_fields(source)
    try:
        recipe = recipe_of(fields)
        tower = recipe.tower.entries if isinstance(recipe.tower, PlanRecipe) else ()
        for spec, _ in (*recipe.entries, *tower):
            layer_range(spec, 10**6)  # a malformed range is refused here, not when a model comes along
        VisualPlan((recipe.default,), semantics=recipe.semantics, before=recipe.before)
    except PlanError as error:
        raise PlanError(f"{origin}: {str(error).split('; ')[0]}") from None
    return recipe
