"""Plans: what visual tokens compute, layer by layer. Data and checks; nothing here knows a model or a tensor.

The five fields of a `LayerPlan` say everything (DESIGN.md section 3); every published method of this kind is a
`VisualPlan` and nothing more. A YAML file may speak of layers by depth, so it is first a `recipe.PlanRecipe`, which
`resolve(num_layers)` turns into a plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DIRECTIONS = ("causal", "both")
SEMANTICS = ("exclude", "zero")
TOKEN_ORDERS = ("attention", "norm", "uniform", "stride", "random")


class PlanError(ValueError):
    """A plan that is malformed, or does not fit the model it is meant for."""


def _check_int(name: str, value, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise PlanError(f"{name}: got {value!r}, expected an integer >= {minimum}")


def _check_cut(name: str, layer, num_layers: int) -> None:
    _check_int(name, layer, 0)
    if layer > num_layers:
        raise PlanError(f"{name}: got {layer}, expected a layer from 0 to the model's {num_layers}")


@dataclass(frozen=True, slots=True)
class Neighborhood:
    """Keys within `radius` grid steps (Chebyshev distance) of a visual query, cut off at the border.

    radius: rows and columns on each side, >= 0. direction: "causal" keeps keys at or before the query in sequence
    order, "both" keeps all (the official code's). frames: how many frames away a key may lie. stride: queries of a
    stride x stride block share the window of the block (NATTEN's aligned windows).
    """

    radius: int
    direction: str = "causal"
    frames: int = 0
    stride: int = 1

    def __post_init__(self):
        _check_int("radius", self.radius, 0)
        _check_int("frames", self.frames, 0)
        _check_int("stride", self.stride, 1)
        if self.direction not in DIRECTIONS:
            raise PlanError(f"direction: got {self.direction!r}, expected one of {', '.join(DIRECTIONS)}")


def _check_keep(name: str, keep) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise PlanError(f"{name}.keep: got {keep!r}, expected a count or a share in [0, 1]")
    if keep < 0 or (isinstance(keep, float) and not keep <= 1):
        raise PlanError(f"{name}.keep: got {keep!r}, expected a count >= 0 or a share in [0, 1]")


@dataclass(frozen=True, slots=True)
class HeadBudget:
    """`keep` query heads: a count (int) or a share of them (float in [0, 1]). Which ones is decided by head scores.

    by: "head", or "group", query heads that share a KV head stay or go together (a cached KV head costs as long as
    one of its query heads is active). over: "layer", the budget is each layer's own, or "model", all layers with this
    budget share it: their heads compete, and `keep` is the mean of a layer.
    """

    keep: int | float
    by: str = "head"
    over: str = "layer"

    def __post_init__(self):
        _check_keep("heads", self.keep)
        if self.by not in ("head", "group"):
            raise PlanError(f"heads.by: got {self.by!r}, expected head or group")
        if self.over not in ("layer", "model"):
            raise PlanError(f"heads.over: got {self.over!r}, expected layer or model")

    def count(self, num_heads: int, layers: int = 1) -> int:
        """Number of heads kept of `layers` layers of `num_heads` (a share is rounded half up)."""
        if isinstance(self.keep, int) and self.keep > num_heads:
            raise PlanError(f"heads.keep: got {self.keep!r}, expected at most the model's {num_heads} heads")
        return self.keep * layers if isinstance(self.keep, int) else math.floor(self.keep * num_heads * layers + 0.5)


@dataclass(frozen=True, slots=True)
class NeuronBudget:
    """`keep` FFN neurons of each layer, a count (int) or a share (float in [0, 1]), by a calibration's importance."""

    keep: int | float

    def __post_init__(self):
        _check_keep("ffn", self.keep)

    def count(self, size: int) -> int:
        """Number of neurons kept of `size` (a share is rounded down, as `ffn: f` is)."""
        if isinstance(self.keep, int) and self.keep > size:
            raise PlanError(f"ffn.keep: got {self.keep!r}, expected at most the model's {size} neurons")
        return self.keep if isinstance(self.keep, int) else int(size * self.keep + 1e-6)


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """The share `keep`, in (0, 1], of a sample's visual tokens that goes on to the next layer; the others leave.

    Of the tokens that came in one call and are left, `count` stay: the first ones in the order that `by` names, of
    equal ones the earlier.

    by: "attention", the largest weight in the layer's attention from the sample's last text row of the call, mean over
    the heads (in a head that is not active the weight is 0). "norm", the largest L2 norm of the row after the layer.
    "uniform", evenly spaced in sequence order. "stride", whole rows and columns of each grid at regular steps: those
    steps whose share is closest to `keep`. "random", the same tokens in every call with as many (a baseline).
    """

    keep: float
    by: str = "attention"

    def __post_init__(self):
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise PlanError(f"tokens.keep: got {self.keep!r}, expected a share in (0, 1]")
        object.__setattr__(self, "keep", float(self.keep))
        if self.by not in TOKEN_ORDERS:
            raise PlanError(f"tokens.by: got {self.by!r}, expected one of {', '.join(TOKEN_ORDERS)}")

    def count(self, num_tokens: int) -> int:
        """Number of tokens kept of `num_tokens`: rounded down, as the official codes do, but at least 1 of any."""
        return min(num_tokens, max(1, int(num_tokens * self.keep + 1e-6)))


@dataclass(frozen=True, slots=True)
class HeadFile:
    """Active heads in a file: `.npy` bool array or `.safetensors` tensor `heads`, (layers, heads)."""

    file: str


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What visual tokens compute in one decoder layer. The default is the dense layer.

    text_reads: text queries read the visual keys of the active heads.
    attention: "full", "none", or a `Neighborhood`: what a visual query reads among visual tokens.
    heads: None (all), a bool mask over query heads, a `HeadBudget`, or a `HeadFile`.
    ffn: share of the FFN neurons that visual rows use (the first ones), the neurons' indices, or a `NeuronBudget`.
    tokens: which visual tokens go on to the next layer, a `TokenBudget`; None (also for a share of 1): all.
    """

    text_reads: bool = True
    attention: str | Neighborhood = "full"
    heads: tuple[bool, ...] | HeadBudget | HeadFile | None = None
    ffn: float | tuple[int, ...] | NeuronBudget = 1.0
    tokens: TokenBudget | None = None

    def __post_init__(self):
        if not isinstance(self.text_reads, bool):
            raise PlanError(f"text_reads: got {self.text_reads!r}, expected true or false")
        if not isinstance(self.attention, Neighborhood) and self.attention not in ("full", "none"):
            raise PlanError(f"attention: got {self.attention!r}, expected 'full', 'none' or a neighborhood")
        object.__setattr__(self, "heads", _normal_heads(self.heads))
        object.__setattr__(self, "ffn", _normal_ffn(self.ffn))
        if not isinstance(self.tokens, TokenBudget | None):
            raise PlanError(f"tokens: got {self.tokens!r}, expected all or {{keep: share, by: order}}")
        if self.tokens and self.tokens.keep == 1:
            object.__setattr__(self, "tokens", None)
        if self.tokens and self.tokens.by == "attention" and not self._may_be_read:
            raise PlanError(
                "tokens.by: got attention in a layer in which text reads no visual token, expected text_reads and an "
                "active head there (norm, uniform, stride and random need neither)"
            )

    @property
    def _may_be_read(self) -> bool:
        return self.text_reads and not (isinstance(self.heads, tuple) and not any(self.heads))

    @classmethod
    def off(cls) -> LayerPlan:
        """The layer that costs nothing: visual tokens are neither read nor changed."""
        return cls(text_reads=False, attention="none", ffn=0.0)

    @property
    def is_dense(self) -> bool:
        all_heads = self.heads is None or (isinstance(self.heads, tuple) and all(self.heads))
        return self.text_reads and self.attention == "full" and all_heads and self.ffn == 1.0 and not self.tokens

    @property
    def updates(self) -> bool:
        """Whether the layer changes the visual rows at all."""
        return self.attention != "none" or self.ffn not in (0.0, ())

    def neurons(self, size: int) -> int | tuple[int, ...]:
        """FFN neurons used by visual rows of a layer with `size` neurons: a count of first ones, or indices."""
        if isinstance(self.ffn, float):
            return int(size * self.ffn + 1e-6)  # the official int(size / ratio), safe against 1/3 * 3 < 1
        if isinstance(self.ffn, NeuronBudget):
            raise PlanError(f"ffn: got the budget {{keep: {self.ffn.keep}}}, expected neurons (resolve it first)")
        if self.ffn and self.ffn[-1] >= size:
            raise PlanError(f"ffn: got neuron {self.ffn[-1]}, expected indices below the model's {size} neurons")
        return self.ffn


def _normal_heads(heads):
    if heads is None or isinstance(heads, HeadBudget | HeadFile):
        return heads
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise PlanError(f"heads: got {heads!r}, expected all, a bool mask, {{keep: n}} or {{file: path}}")
    mask = tuple(heads.tolist() if hasattr(heads, "tolist") else heads)
    if not mask or any(value not in (0, 1) for value in mask):
        raise PlanError(f"heads: got {heads!r}, expected a non-empty mask of booleans, one a query head")
    return tuple(bool(value) for value in mask)


def _normal_ffn(ffn):
    if isinstance(ffn, NeuronBudget):
        return ffn
    if hasattr(ffn, "tolist"):  # arrays and tensors of indices, as a calibration makes them
        ffn = ffn.tolist()
    if isinstance(ffn, int | float) and not isinstance(ffn, bool):
        if not 0 <= ffn <= 1:
            raise PlanError(f"ffn: got {ffn!r}, expected a share in [0, 1] or neuron indices")
        return float(ffn)
    if isinstance(ffn, str | bool) or not isinstance(ffn, Iterable):
        raise PlanError(f"ffn: got {ffn!r}, expected a share in [0, 1] or neuron indices")
    indices = tuple(ffn)
    for index in indices:
        _check_int("ffn", index, 0)
    if list(indices) != sorted(set(indices)):
        raise PlanError("ffn: expected neuron indices in ascending order without repeats")
    return indices


@dataclass(frozen=True, slots=True)
class VisualPlan:
    """One `LayerPlan` a decoder layer, with a name, its source (`about`) and the softmax `semantics`.

    semantics "exclude": softmax runs over what is read, nothing else exists. "zero": the official code's arithmetic
    (arXiv 2410.06169), in which unread visual keys stay in the softmax's denominator and visual rows go on to the end.
    """

    layers: tuple[LayerPlan, ...]
    name: str = "custom"
    about: str = ""
    semantics: str = "exclude"

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or not all(isinstance(layer, LayerPlan) for layer in self.layers):
            raise PlanError("layers: expected one LayerPlan a decoder layer, at least one")
        if self.semantics not in SEMANTICS:
            raise PlanError(f"semantics: got {self.semantics!r}, expected one of {', '.join(SEMANTICS)}")
        self._check_tokens()

    def _check_tokens(self) -> None:
        budgets = [(index, layer.tokens) for index, layer in enumerate(self.layers) if layer.tokens]
        if budgets and self.semantics == "zero":
            raise PlanError(
                f"layer {budgets[0][0]}: tokens: got a share to keep under semantics 'zero', expected 'exclude' "
                "(in the official arithmetic every visual row goes on to the end)"
            )
        for index, budget in budgets[1:]:
            if budget.by == "stride":
                raise PlanError(
                    f"layer {index}: tokens.by: got stride after tokens left in layer {budgets[0][0]}, expected whole "
                    "grids (stride may only come first)"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def is_dense(self) -> bool:
        return all(layer.is_dense for layer in self.layers)

    def replace(self, **changes) -> VisualPlan:
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
        return cls((LayerPlan(),) * num_layers, name="dense", about="the unpatched model's computation")

    @classmethod
    def yopo(
        cls,
        num_layers: int,
        window: int = 5,
        layer_cut: int | None = None,
        head_mask=None,
        ffn_ratio: float = 1,
        semantics: str = "exclude",
    ) -> VisualPlan:
        """The official settings of arXiv 2410.06169.

        window: side of the neighbourhood in tokens (an even side equals the next smaller odd one). layer_cut: first
        layer in which text no longer reads visual tokens. head_mask: bool (num_layers, heads), True = active.
        ffn_ratio: visual rows use the first int(size / ffn_ratio) neurons.
        """
        _check_int("window", window, 1)
        if not ffn_ratio >= 1:
            raise PlanError(f"ffn_ratio: got {ffn_ratio!r}, expected a number >= 1")
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
        _check_int("after", after, 1)
        _check_cut("after", after, num_layers)
        layers = (LayerPlan(tokens=TokenBudget(keep, by) if i == after - 1 else None) for i in range(num_layers))
        return cls(tuple(layers), "fastv", "FastV, arXiv 2403.06764")

    @classmethod
    def pyramiddrop(cls, num_layers: int, keep: float = 0.5, stages: int = 4) -> VisualPlan:
        """PyramidDrop (arXiv 2410.17247): between `stages` equal parts of the depth, `keep` of what is left goes on.

        The scores are those of the layer before each cut; the official code takes the query and key weights of the
        layer behind it.
        """
        _check_int("stages", stages, 1)
        ends = {math.ceil(num_layers * stage / stages) - 1 for stage in range(1, stages)}
        layers = (LayerPlan(tokens=TokenBudget(keep) if i in ends else None) for i in range(num_layers))
        return cls(tuple(layers), "pyramiddrop", "PyramidDrop, arXiv 2410.17247")

    @classmethod
    def from_yaml(cls, source: str | Path, num_layers: int | None = None) -> VisualPlan:
        """The plan of a YAML file or text. `num_layers` is needed when the file does not state its own."""
        from .plan_yaml import read_recipe

        return read_recipe(source).resolve(num_layers)

    def to_yaml(self) -> str:
        """The plan as YAML text; `from_yaml` of it gives an equal plan."""
        from .plan_yaml import write_plan

        return write_plan(self)


def _layer_set(layers: Iterable[int], num_layers: int) -> frozenset[int]:
    chosen = frozenset(layers)
    for index in chosen:
        if not 0 <= index < num_layers:
            raise PlanError(f"layers: got layer {index}, expected 0 to {num_layers - 1}")
    return chosen


def mask_plan(plan: VisualPlan, masks: Sequence[Sequence[bool]]) -> VisualPlan:
    """`plan` with the active heads of every layer set by `masks`, bool (layers, heads)."""
    if len(masks) != plan.num_layers:
        raise PlanError(f"heads: got masks for {len(masks)} layers, expected {plan.num_layers}")
    pairs = zip(plan.layers, masks, strict=True)
    layers = (dataclasses.replace(layer, heads=tuple(map(bool, mask))) for layer, mask in pairs)
    return plan.replace(layers=tuple(layers))


def with_layer(plan: VisualPlan, index: int, layer: LayerPlan) -> VisualPlan:
    """`plan` with one layer replaced."""
    return plan.replace(layers=(*plan.layers[:index], layer, *plan.layers[index + 1 :]))
