"""Attention over lanes, one backend a file, each with `text_attention` and `visual_attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

BACKENDS = {"reference": "reference", "torch": "tiled"}


@dataclass(frozen=True)
class Backend:
    """The two operations of a backend; `reference` documents them."""

    name: str
    text_attention: Callable[..., torch.Tensor]
    visual_attention: Callable[..., torch.Tensor]


def get_backend(name: str = "auto") -> Backend:
    """The backend called `name`; "auto" takes `torch`, which runs everywhere. ValueError names the known ones."""
    chosen = "torch" if name == "auto" else name
    if chosen not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected auto, {', '.join(BACKENDS)}")
    module = import_module(f".{BACKENDS[chosen]}", __name__)
    return Backend(chosen, module.text_attention, module.visual_attention)
