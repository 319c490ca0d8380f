"""Malformed inputs, made from valid ones by seeded mutation: structures (what YAML and JSON hold), bytes, and words."""

from __future__ import annotations

import copy
import math

import numpy as np

# In the place of any value. (10**400 is more than a float holds, and json and yaml both write it.)
NASTY = (
    None, True, False, 0, -1, 1, 3, 2**63, -(2**63), 10**400, 0.5, -0.5, 1.5, 1e308, math.nan, math.inf, -math.inf,
    "", " ", "x", "a" * 3000, "\u202e\U0001f4a5", "null", "1", "0-", "-1", "100%", "../../x", "/dev/null/nowhere",
    [], {}, [[]], [None], [1, "2", None], {"a": 1}, {"keep": "x"}, {"": {}}, [1e308] * 40,
)  # fmt: skip
# In the place of a word of a command line.
WORDS = (
    "", " ", "x", "-1", "0", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "/dev/null/x/y", "a,b", ",", "1x1", "0x0",
    "-1x5", "1x", "None", "\U0001f4a5", "a" * 5000, "..", ".", "/", "/dev/null/x",
)  # fmt: skip


def nodes(value, path=()):
    """Paths to everything in a structure."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from nodes(inner, (*path, key))


def mutated(value, rng: np.random.Generator):
    """A structure with one to three of its values replaced, removed, renamed, doubled or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        paths = list(nodes(value))
        path = paths[rng.integers(len(paths))]
        nasty = copy.deepcopy(NASTY[rng.integers(len(NASTY))])
        if not path:
            if rng.random() < 0.1:
                value = nasty
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        key, kind = path[-1], rng.integers(6)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[str(key) + "s"] = owner.pop(key)
        elif kind == 2:
            owner[key] = [owner[key]]
        elif kind == 3 and isinstance(owner, list):
            owner.append(nasty)
        else:
            owner[key] = nasty
    return value


def broken(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes cut off, with some changed, removed, put in or repeated; now and then nothing or noise."""
    kind, size = rng.integers(8), len(data)
    at = int(rng.integers(size + 1))
    some = bytes(rng.integers(0, 256, int(rng.integers(1, 40)), dtype=np.uint8))
    if kind <= 1:
        return data[:at]
    if kind == 2:
        return data[:at] + some + data[at:]
    if kind == 3:
        return data[:at] + some + data[at + len(some) :]
    if kind == 4:
        return data[:at] + data[at + len(some) :]
    if kind == 5:
        return data[at:]
    if kind == 6:  # near the start, where headers are
        early = int(rng.integers(min(size, 128) + 1))
        return data[:early] + some + data[early + len(some) :]
    return (b"", some, b"\0" * 64, b"\xff\xfe" + some, data + data)[rng.integers(5)]
