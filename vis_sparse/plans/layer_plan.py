"""What visual tokens compute in one layer. Data and checks; nothing here knows a model or a tensor.

The five fields of a `LayerPlan` say everything (DESIGN.md section 3).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass

DIRECTIONS = ("causal", "both")
_FARTHEST = 1_000_000  # steps in a grid
TOKEN_ORDERS = ("attention", "norm", "uniform", "stride", "random")


class PlanError(ValueError):
    """A plan that is malformed, or does not fit the model it is meant for."""


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 80, 80


def brief(value) -> str:
    """A value as errors show it: cut off, whatever a file says that it holds."""
    try:
        return " ".join(_BRIEF.repr(value).split())
    except ValueError:  # Python writes no integer of more than some thousand digits
        return f"a {type(value).__name__} with a huge integer"


def reason(error: Exception) -> str:
    """What an error of another library says, in one line of no more than some hundred characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_int(name: str, value, minimum: int, maximum: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise PlanError(f"{name}: got {brief(value)}, expected an integer >= {minimum}")
    if maximum is not None and value > maximum:
        raise PlanError(f"{name}: got {brief(value)}, expected an integer <= {maximum}")


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

    def __post_init__(self) -> None:
        check_int("radius", self.radius, 0, _FARTHEST)
        check_int("frames", self.frames, 0, _FARTHEST)
        check_int("stride", self.stride, 1, _FARTHEST)
        if self.direction not in DIRECTIONS:
            raise PlanError(f"direction: got {brief(self.direction)}, expected one of {', '.join(DIRECTIONS)}")


def _check_keep(name: str, keep) -> None:
    if not is_number(keep):
        raise PlanError(f"{name}.keep: got {brief(keep)}, expected a count or a share in [0, 1]")
    if keep < 0 or (isinstance(keep, float) and not keep <= 1):
        raise PlanError(f"{name}.keep: got {brief(keep)}, expected a count >= 0 or a share in [0, 1]")


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

    def __post_init__(self) -> None:
        _check_keep("heads", self.keep)
        if self.by not in ("head", "group"):
            raise PlanError(f"heads.by: got {brief(self.by)}, expected head or group")
        if self.over not in ("layer", "model"):
            raise PlanError(f"heads.over: got {brief(self.over)}, expected layer or model")

    def count(self, num_heads: int, layers: int = 1) -> int:
        """Number of heads kept of `layers` layers of `num_heads` (a share is rounded half up)."""
        if isinstance(self.keep, int) and self.keep > num_heads:
            raise PlanError(f"heads.keep: got {brief(self.keep)}, expected at most the model's {num_heads} heads")
        return self.keep * layers if isinstance(self.keep, int) else math.floor(self.keep * num_heads * layers + 0.5)


@dataclass(frozen=True, slots=True)
class NeuronBudget:
    """`keep` FFN neurons of each layer, a count (int) or a share (float in [0, 1]), by a calibration's importance."""

    keep: int | float

    def __post_init__(self) -> None:
        _check_keep("ffn", self.keep)

    def count(self, size: int) -> int:
        """Number of neurons kept of `size` (a share is rounded down, as `ffn: f` is)."""
        if isinstance(self.keep, int) and self.keep > size:
            raise PlanError(f"ffn.keep: got {brief(self.keep)}, expected at most the model's {size} neurons")
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

    def __post_init__(self) -> None:
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise PlanError(f"tokens.keep: got {brief(self.keep)}, expected a share in (0, 1]")
        object.__setattr__(self, "keep", float(self.keep))
        if self.by not in TOKEN_ORDERS:
            raise PlanError(f"tokens.by: got {brief(self.by)}, expected one of {', '.join(TOKEN_ORDERS)}")

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

    def __post_init__(self) -> None:
        if not isinstance(self.text_reads, bool):
            raise PlanError(f"text_reads: got {brief(self.text_reads)}, expected true or false")
        if not isinstance(self.attention, Neighborhood) and self.attention not in ("full", "none"):
            raise PlanError(f"attention: got {brief(self.attention)}, expected 'full', 'none' or a neighborhood")
        object.__setattr__(self, "heads", _normal_heads(self.heads))
        object.__setattr__(self, "ffn", _normal_ffn(self.ffn))
        if not isinstance(self.tokens, TokenBudget | None):
            raise PlanError(f"tokens: got {brief(self.tokens)}, expected all or {{keep: share, by: order}}")
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
            raise PlanError(f"ffn: got neuron {brief(self.ffn[-1])}, expected indices below the model's {size} neurons")
        return self.ffn


def _normal_heads(heads):
    if heads is None or isinstance(heads, HeadBudget | HeadFile):
        return heads
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise PlanError(f"heads: got {brief(heads)}, expected all, a bool mask, {{keep: n}} or {{file: path}}")
    mask = tuple(heads.tolist() if hasattr(heads, "tolist") else heads)
    if not mask or any(value not in (0, 1) for value in mask):
        raise PlanError(f"heads: got {brief(heads)}, expected a non-empty mask of booleans, one a query head")
    return tuple(bool(value) for value in mask)


def _normal_ffn(ffn):
    if isinstance(ffn, NeuronBudget):
        return ffn
    if hasattr(ffn, "tolist"):  # arrays and tensors of indices, as a calibration makes them
        ffn = ffn.tolist()
    if isinstance(ffn, int | float) and not isinstance(ffn, bool):
        if not 0 <= ffn <= 1:
            raise PlanError(f"ffn: got {brief(ffn)}, expected a share in [0, 1] or neuron indices")
        return float(ffn)
    if isinstance(ffn, str | bool) or not isinstance(ffn, Iterable):
        raise PlanError(f"ffn: got {brief(ffn)}, expected a share in [0, 1] or neuron indices")
    indices = tuple(ffn)
    for index in indices:
        check_int("ffn", index, 0)
    if list(indices) != sorted(set(indices)):
        raise PlanError("ffn: expected neuron indices in ascending order without repeats")
    return indices
