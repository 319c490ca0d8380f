"""Attention over lanes, one backend a file, each with `text_attention` and `visual_attention`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

BACKENDS = {"reference": "reference", "torch": "tiled"}


def get_backend(name: str = "auto") -> ModuleType:
    """The backend called `name`; "auto" takes `torch`, which runs everywhere. ValueError names the known ones."""
    chosen = "torch" if name == "auto" else name
    if chosen not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected auto, {', '.join(BACKENDS)}")
    return import_module(f".{BACKENDS[chosen]}", __name__)
