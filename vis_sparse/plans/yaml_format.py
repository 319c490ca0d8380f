"""Plans as YAML: reading with every check where the data comes in, and writing so that the round trip is equal."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import yaml

from .atomic_write import is_file
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

_PLAN_KEYS = ("name", "about", "semantics", "num_layers", "default", "layers")
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
    entries = data.get("layers") or {}
    if not isinstance(entries, dict):
        raise PlanError(f"layers: got {type(entries).__name__}, expected a mapping of layer ranges")
    num_layers = data.get("num_layers")
    if num_layers is not None and (type(num_layers) is not int or num_layers < 1):
        raise PlanError(f"num_layers: got {brief(num_layers)}, expected an integer >= 1")
    default = _changes(data.get("default", {}), "default")
    return {
        "name": _words("name", data.get("name", "custom")),
        "about": _words("about", data.get("about", "")),
        "semantics": data.get("semantics", "exclude"),
        "default": default if isinstance(default, LayerPlan) else LayerPlan(**default),
        "entries": tuple((_words("layers", spec), _changes(value, _where(spec))) for spec, value in entries.items()),
        "num_layers": num_layers,
    }


def _where(spec) -> str:
    return f"layers {spec if isinstance(spec, str) and len(spec) < 40 else brief(spec)}"


def _words(name: str, value) -> str:
    """Text; numbers are taken as they are written."""
    if not isinstance(value, str) and not is_number(value):
        raise PlanError(f"{name}: got {brief(value)}, expected text")
    return value if isinstance(value, str) else brief(value)


def _changes(value, where: str) -> dict | LayerPlan:
    # YAML 1.1 reads a bare `off` as False
    if value is False or value == "off":
        return LayerPlan.off()
    if not isinstance(value, dict):
        raise PlanError(f"{where}: got {brief(value)}, expected 'off' or the keys {', '.join(_LAYER_KEYS)}")
    _known(value, _LAYER_KEYS, where)
    changes = dict(value)
    if "attention" in changes:
        changes["attention"] = _attention(changes["attention"], where)
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


def _attention(value, where: str):
    if not isinstance(value, dict):
        return value
    _known(value, _NEIGHBORHOOD_KEYS, f"{where}: attention")
    if "radius" not in value:
        raise PlanError(f"{where}: attention: radius is missing")
    try:
        return Neighborhood(**value)
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


def write_fields(name: str, about: str, semantics: str, layers: Sequence[LayerPlan]) -> str:
    """A plan as YAML text, runs of equal layers written once."""
    data = plan_data(name, about, semantics, layers)
    return yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)


def plan_data(name: str, about: str, semantics: str, layers: Sequence[LayerPlan]) -> dict:
    """A plan as a file holds it, runs of equal layers once."""
    entries = {}
    for layer, run in groupby(range(len(layers)), key=lambda i: layers[i]):
        indices = list(run)
        spec = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        entries[spec] = "off" if layer == LayerPlan.off() else _layer_dict(layer)
    return {
        "name": name,
        "about": about,
        "semantics": semantics,
        "num_layers": len(layers),
        "layers": entries,
    }


def _layer_dict(layer: LayerPlan) -> dict:
    attention, heads, ffn = layer.attention, layer.heads, layer.ffn
    if isinstance(attention, Neighborhood):
        attention = dataclasses.asdict(attention)
    if isinstance(heads, HeadBudget | HeadFile):
        heads = dataclasses.asdict(heads)
    if isinstance(ffn, NeuronBudget):
        ffn = dataclasses.asdict(ffn)
    fields = {
        "text_reads": layer.text_reads,
        "attention": attention,
        "heads": "all" if heads is None else list(heads) if isinstance(heads, tuple) else heads,
        "ffn": list(ffn) if isinstance(ffn, tuple) else ffn,
    }
    return fields if layer.tokens is None else fields | {"tokens": dataclasses.asdict(layer.tokens)}
