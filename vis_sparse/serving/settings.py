"""What an engine is told: `--additional-config '{"vis_sparse": {"plan": "vica", "plans": ["vtw"]}}'`.

A checkpoint's own plans, in its config.json, are taken where nothing is said. Read once, where the engine's
configuration is made, and put back in full (`Loaded.to_block`): workers on other machines need no plan file, and what a
compiled graph is keyed by covers what the plans say, not what their files are called.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..plans.budgets import resolve_heads
from ..plans.carried import KEY, read_block
from ..plans.files import load_plan
from ..plans.layer_plan import PlanError, brief
from ..plans.plan import VisualPlan
from .errors import ServingError
from .kinds import LayerKinds, layer_kinds

_KNOWN = ("plan", "plans", "calibration")
_LOADED = "loaded"


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of a text model that plans are checked against."""

    layers: int
    heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True)
class Loaded:
    """The plans of an engine: the first is what requests follow that say nothing. "dense" is always among them.

    block: tokens of a cache block, by which images are laid out (`tables`).
    """

    plans: tuple[VisualPlan, ...]
    block: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(plan.name for plan in self.plans)

    def kinds(self, shape: TextShape) -> tuple[LayerKinds, ...]:
        """What each layer does. Raises ServingError for a plan that an engine cannot run."""
        return layer_kinds(self.plans, shape.heads, shape.kv_heads, shape.ffn)

    def index(self, name: Any) -> int:
        """Of the plan called `name`; None is the default. Raises ServingError if it was not loaded."""
        if name is None:
            return 0
        if name not in self.names:
            raise ServingError(
                f"vis_sparse_plan: got {brief(name)}, expected one of the plans that the engine loaded: "
                f'{", ".join(self.names)} (others: the engine\'s "plans")'
            )
        return self.names.index(name)

    def to_block(self) -> dict:
        """As JSON, for the workers."""
        return {_LOADED: [plan.to_yaml() for plan in self.plans], "block": self.block}

    @classmethod
    def from_block(cls, block: Mapping) -> Loaded:
        return cls(tuple(VisualPlan.from_yaml(text) for text in block[_LOADED]), block["block"])


def is_loaded(block: Any) -> bool:
    """Whether `block` is one that `Loaded.to_block` wrote."""
    return isinstance(block, Mapping) and _LOADED in block


def read_settings(block: Any, shape: TextShape, cache_block: int) -> Loaded:
    """The plans that a block asks for, resolved for a model. Raises ServingError."""
    if not isinstance(block, Mapping):
        raise ServingError(f'{KEY}: got {brief(block)}, expected a mapping such as {{"plan": "vica"}}')
    for key in block:
        if key not in _KNOWN:
            near = difflib.get_close_matches(str(key), _KNOWN, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ServingError(f"{KEY}: got unknown key {brief(key)}, expected one of {', '.join(_KNOWN)}{hint}")
    if "plan" not in block:
        raise ServingError(f'{KEY}: got no "plan", expected the name of a plan or its YAML file')
    others = block.get("plans", [])
    if not isinstance(others, list):
        raise ServingError(f"{KEY}: plans: got {brief(others)}, expected a list of names or YAML files")
    try:
        plans = [_resolved(source, shape, block.get("calibration")) for source in [block["plan"], *others]]
        layer_kinds(plans, shape.heads, shape.kv_heads, shape.ffn)
    except PlanError as error:
        raise ServingError(f"{KEY}: {error}") from None
    names = [plan.name for plan in plans]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ServingError(f"{KEY}: got the plan {sorted(twice)[0]!r} twice, expected plans of different names")
    if "dense" not in names:
        plans.append(VisualPlan.dense(shape.layers))
    return Loaded(tuple(plans), cache_block)


def read_carried(block: Any, shape: TextShape, cache_block: int) -> Loaded:
    """The plans that a checkpoint's config.json carries. Raises ServingError."""
    try:
        plans = [plan.replace(name=name) for name, plan in read_block(block).items()]
        if "dense" not in block["plans"]:
            plans.append(VisualPlan.dense(shape.layers))
        layer_kinds(plans, shape.heads, shape.kv_heads, shape.ffn)
    except (PlanError, ServingError) as error:
        raise ServingError(
            f"{error}; the checkpoint carries this plan: give {KEY} another one, or null to serve it as vLLM does"
        ) from None
    return Loaded(tuple(plans), cache_block)


def _resolved(source, shape: TextShape, calibration) -> VisualPlan:
    plan = load_plan(source).resolve(shape.layers)
    return resolve_heads(plan, shape.heads, shape.kv_heads, calibration=calibration)
