"""Tensors and text metadata in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .atomic_write import replaced

_FACTS = "vis_sparse"


def write_tensors(path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    The metadata is one JSON text: safetensors writes several entries in any order, and equal runs give equal files.
    """
    facts = {_FACTS: json.dumps(metadata, sort_keys=True)}
    with replaced(path) as new:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, new, facts)


def read_tensors(
    path: str | Path, names: Collection[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors (None: all; or some of them) and the metadata of a safetensors file.

    Raises ValueError if it is missing or something else.
    """
    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys() if names is None or name in names}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, RecursionError) as error:  # types that numpy does not have
        raise ValueError(str(error)) from None
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise ValueError("its metadata is not text to text")
    return tensors, facts
