"""Plans as YAML: reading with every check where the data comes in, and writing so that the round trip is equal."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import yaml

from .atomic_write import is_file
from .before import TokensBefore
from .layer_plan import (
    HeadBudget,
    HeadFile,
    LayerPlan,
    Neighborhood,
    NeuronBudget,
    PlanError,
    TokenBudget,
    brief,
    is_number,
    reason,
)

_TOWER_KEYS = ("num_layers", "default", "layers")
_PLAN_KEYS = ("name", "about", "semantics", *_TOWER_KEYS, "tower", "before")
_LAYER_KEYS = tuple(f.name for f in dataclasses.fields(LayerPlan))
# What PyYAML raises for numbers, dates and booleans that are none, and for text nested too deeply.
_WRONG_VALUES = (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError)
_NEIGHBORHOOD_KEYS = tuple(f.name for f in dataclasses.fields(Neighborhood))


def read_fields(source: str | Path) -> tuple[dict, str]:
    """The fields of a `PlanRecipe`, and what to call their source in errors.

    source: a YAML file (a `Path`, or a string that names a file) or YAML text.
    """
    if isinstance(source, str) and ("\n" in source or ":" in source and not is_file(source)):
        text, origin = source, "plan"
    elif isinstance(source, str | Path) and is_file(source):
        text, origin = None, str(source)
    else:
        raise PlanError(f"plan: got {brief(source)}, expected a YAML file or YAML text")
    try:
        data = yaml.safe_load(Path(source).read_text(encoding="utf-8") if text is None else text)
    except OSError as error:
        raise PlanError(f"{origin}: {error}") from None
    except (yaml.YAMLError, *_WRONG_VALUES) as error:
        raise PlanError(f"{origin}: not YAML: {reason(error)}") from None
    if not isinstance(data, dict):
        keys = ", ".join(_PLAN_KEYS)
        raise PlanError(f"{origin}: got {type(data).__name__}, expected a mapping with the keys {keys}")
    return checked_fields(data, origin), origin


def checked_fields(data: dict, origin: str) -> dict:
    """The fields of a `PlanRecipe` from what a file holds, `plan_data` written out. Raises PlanError naming origin."""
    try:
        return _fields(data)
    except PlanError as error:
        raise PlanError(f"{origin}: {error}") from None


def _known(keys, known: tuple[str, ...], where: str) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(brief(key).strip("'"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"{where}: got unknown key {brief(key)}, expected one of {', '.join(known)}{hint}")


def _fields(data: dict) -> dict:
    _known(data, _PLAN_KEYS, "plan")
    return {
        "name": _words("name", data.get("name", "custom")),
        "about": _words("about", data.get("about", "")),
        "semantics": data.get("semantics", "exclude"),
        **_layers(data),
        "tower": _tower(data.get("tower")),
        "before": _before(data.get("before")),
    }


def _tower(data) -> dict | None:
    """The fields of the tower's recipe."""
    if data is None:
        return None
    if not isinstance(data, dict):
        raise PlanError(f"tower: got {brief(data)}, expected a mapping with the keys {', '.join(_TOWER_KEYS)}")
    _known(data, _TOWER_KEYS, "tower")
    try:
        return _layers(data, {"direction": "both"})
    except PlanError as error:
        raise PlanError(f"tower: {error}") from None


def _before(value) -> TokensBefore | None:
    if value is None or value == "all":
        return None
    keys = tuple(f.name for f in dataclasses.fields(TokensBefore))
    if not isinstance(value, dict):
        raise PlanError(f"before: got {brief(value)}, expected 'all' or the keys {', '.join(keys)}")
    _known(value, keys, "before")
    if "by" not in value:
        raise PlanError("before: by is missing")
    return TokensBefore(**value)


def _layers(data: dict, near: Mapping = MappingProxyType({})) -> dict:
    """Depth, default and entries of a recipe. near: what a neighbourhood is where a file does not say it."""
    entries = data.get("layers") or {}
    if not isinstance(entries, dict):
        raise PlanError(f"layers: got {type(entries).__name__}, expected a mapping of layer ranges")
    num_layers = data.get("num_layers")
    if num_layers is not None and (type(num_layers) is not int or num_layers < 1):
        raise PlanError(f"num_layers: got {brief(num_layers)}, expected an integer >= 1")
    default = _changes(data.get("default", {}), "default", near)
    named = ((_words("layers", spec), _changes(value, _where(spec), near)) for spec, value in entries.items())
    return {
        "default": default if isinstance(default, LayerPlan) else LayerPlan(**default),
        "entries": tuple(named),
        "num_layers": num_layers,
    }


def _where(spec) -> str:
    return f"layers {spec if isinstance(spec, str) and len(spec) < 40 else brief(spec)}"


def _words(name: str, value) -> str:
    """Text; numbers are taken as they are written."""
    if not isinstance(value, str) and not is_number(value):
        raise PlanError(f"{name}: got {brief(value)}, expected text")
    return value if isinstance(value, str) else brief(value)


def _changes(value, where: str, near: Mapping) -> dict | LayerPlan:
    # YAML 1.1 reads a bare `off` as False
    if value is False or value == "off":
        return LayerPlan.off()
    if not isinstance(value, dict):
        raise PlanError(f"{where}: got {brief(value)}, expected 'off' or the keys {', '.join(_LAYER_KEYS)}")
    _known(value, _LAYER_KEYS, where)
    changes = dict(value)
    if "attention" in changes:
        changes["attention"] = _attention(changes["attention"], where, near)
    if "heads" in changes:
        changes["heads"] = _heads(changes["heads"], where)
    if "ffn" in changes:
        changes["ffn"] = _ffn(changes["ffn"], where)
    if "tokens" in changes:
        changes["tokens"] = _tokens(changes["tokens"], where)
    try:
        LayerPlan(**changes)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None
    return changes


def _attention(value, where: str, near: Mapping):
    if not isinstance(value, dict):
        return value
    _known(value, _NEIGHBORHOOD_KEYS, f"{where}: attention")
    if "radius" not in value:
        raise PlanError(f"{where}: attention: radius is missing")
    try:
        return Neighborhood(**{**near, **value})
    except PlanError as error:
        raise PlanError(f"{where}: attention: {error}") from None


def _heads(value, where: str):
    if value is None or value == "all":
        return None
    if isinstance(value, dict):
        _known(value, ("keep", "by", "over", "file"), f"{where}: heads")
        if ("keep" in value) == ("file" in value) or "file" in value and len(value) > 1:
            raise PlanError(f"{where}: heads: got {brief(value)}, expected either keep or file")
        if "file" in value:
            return HeadFile(_words(f"{where}: heads.file", value["file"]))
        return _budget(HeadBudget, value, where, "heads")
    return tuple(value) if isinstance(value, list) else value


def _ffn(value, where: str):
    if isinstance(value, dict):
        return _budget(NeuronBudget, value, where, "ffn")
    return tuple(value) if isinstance(value, list) else value


def _tokens(value, where: str):
    if value is None or value == "all":
        return None
    return _budget(TokenBudget, value, where, "tokens") if isinstance(value, dict) else value


def _budget(kind: type, value: dict, where: str, field: str):
    """A budget of a class whose fields are the keys; `keep` has no default."""
    _known(value, tuple(f.name for f in dataclasses.fields(kind)), f"{where}: {field}")
    if "keep" not in value:
        raise PlanError(f"{where}: {field}: keep is missing")
    try:
        return kind(**value)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


def write(plan) -> str:
    """A `VisualPlan` as YAML text, runs of equal layers written once."""
    return yaml.safe_dump(plan_data(plan), sort_keys=False, width=120, default_flow_style=None)


def plan_data(plan) -> dict:
    """A `VisualPlan` as a file holds it, runs of equal layers once."""
    named = {"name": plan.name, "about": plan.about, "semantics": plan.semantics}
    data = {**named, "num_layers": plan.num_layers, "layers": _runs(plan.layers)}
    if plan.before is not None:
        data["before"] = plan.before.to_data()
    return data if plan.tower is None else data | {"tower": _tower_data(plan.tower)}


def _tower_data(tower) -> dict:
    """A tower's plan or recipe as a file holds it."""
    if not hasattr(tower, "entries"):
        return {"num_layers": tower.num_layers, "layers": _runs(tower.layers)}
    return {"default": _written(tower.default), "layers": {spec: _written(changes) for spec, changes in tower.entries}}


def _runs(layers: Sequence[LayerPlan]) -> dict:
    entries = {}
    for layer, run in groupby(range(len(layers)), key=lambda i: layers[i]):
        indices = list(run)
        spec = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        entries[spec] = _written(layer)
    return entries


def _written(changes: LayerPlan | Mapping) -> str | dict:
    """A layer's plan, or some of its fields, as a file holds them."""
    if changes == LayerPlan.off():
        return "off"
    if isinstance(changes, LayerPlan):
        changes = {name: getattr(changes, name) for name in _LAYER_KEYS if changes.tokens or name != "tokens"}
    return {name: _value(name, value) for name, value in changes.items()}


def _value(name: str, value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if name in ("heads", "tokens") and value is None:
        return "all"
    return list(value) if isinstance(value, tuple) else value
