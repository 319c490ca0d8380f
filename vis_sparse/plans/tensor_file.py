"""Tensors and text metadata in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
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


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    with safe_open(path, "np") as file:
        facts = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
