"""What rows of results have to hold for a page to be made of them."""

from __future__ import annotations

import math

from ..plans.layer_plan import brief

_FACTS = {
    "machine": {"cpu": str, "threads": int, "device": str},
    "versions": {"torch": str, "transformers": str},
    "date": str,
}
_SETTING = {"model": str, "layers": int, "dtype": str, "visual_tokens": int, "text_tokens": int}
_SPREAD = [float]
_STRIP = {"about": str, "visual_tokens": int, "text_tokens": int, "share": float, "shares": _SPREAD, "reads": list}
# A type; a number that may be None, as `...`; a list of numbers; the fields of an object.
FIELDS: dict[str, dict] = {
    "eval": {
        "model": str, "task": str, "plan": str, "metric": str, "value": float, "samples": int, "failed": dict,
        **dict.fromkeys(("stderr", "same_as_dense", "gflops", "kv_mib", "latency_ms", "speedup"), ...),
    },
    "bench": {
        **_SETTING, **_FACTS, "plan": str, "batch": int, "tower_layers": int,
        "spread": {"dense_s": _SPREAD, "patched_s": _SPREAD},
        **dict.fromkeys(("dense_s", "patched_s", "speedup", "flop_ratio", "efficiency", "efficiency_vs_dense_plan",
                         "decoder_dense_s", "decoder_patched_s", "decoder_speedup",
                         "kv_bytes", "kv_bytes_dense", "peak_bytes", "peak_bytes_dense"), float),
    },
    "peers": {**_SETTING, **_FACTS, "peer": str, "new_tokens": int},
}  # fmt: skip


def wrong(row: dict, kind: str) -> str | None:
    """What is wrong with a row of results, None if nothing is."""
    fields = dict(FIELDS[kind])
    if kind == "eval":
        if row.get("gflops") is not None:
            fields |= {"gflops_dense": float, "kv_mib": float, "kv_mib_dense": float}
        if "machine" in row:
            fields |= _FACTS
    if kind == "peers":
        fields |= {"why": str} if "why" in row else {"s": float, "spread": _SPREAD, "speedup": float, "peak_bytes": ...}
    if "decode_speedup" in row:
        fields["decode_speedup"] = float
    strip = row.get("strip")
    if strip is not None:
        fields["strip"] = _STRIP
    problem = _wrong(row, fields)
    if problem is None and strip is not None and len(strip["reads"]) != len(strip["shares"]):
        return f"strip: got {len(strip['shares'])} shares and {len(strip['reads'])} reads, expected one of each a layer"
    return problem


def _wrong(value: dict, fields: dict) -> str | None:
    for name, expected in fields.items():
        if name not in value:
            return f"{name} is missing"
        given = value[name]
        if isinstance(expected, dict):
            problem = _wrong(given, expected) if isinstance(given, dict) else f"got {brief(given)}, expected an object"
            if problem:
                return f"{name}: {problem}"
        elif not _fits(given, expected, is_divisor=name.endswith("_dense")):
            return f"{name}: got {brief(given)}, expected {_WORDS.get(str(expected), 'a number')}"
    return None


_WORDS = {
    str(list): "a list",
    str(str): "text",
    str(dict): "an object",
    str(int): "an integer >= 0",
    str(_SPREAD): "numbers >= 0",
}


def _fits(given, expected, is_divisor: bool) -> bool:
    if expected is ...:
        return given is None or _is_number(given)
    if expected == _SPREAD:
        return isinstance(given, list) and len(given) > 0 and all(_is_number(each) and each >= 0 for each in given)
    if expected is int:
        return isinstance(given, int) and not isinstance(given, bool) and 0 <= given < 1 << 53
    if expected is float:
        return _is_number(given) and (given > 0 or not is_divisor)
    return isinstance(given, expected)


def _is_number(value) -> bool:
    # numbers of a size that something was measured of
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e30 and not math.isnan(value)
