"""Attention over lanes, one backend a file, each with the three operations that `reference` documents."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

BACKENDS = {"reference": "reference", "torch": "tiled", "flex": "flex", "triton": "triton_backend"}
VARIABLE = "VIS_SPARSE_BACKEND"
_FUSED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Backend:
    """The operations of a backend; `reference` documents them."""

    name: str
    text_attention: Callable[..., torch.Tensor]
    visual_attention: Callable[..., torch.Tensor]
    attention_mass: Callable[..., torch.Tensor]


def get_backend(name: str = "auto") -> Backend:
    """The backend called `name`.

    "auto" is what the environment variable VIS_SPARSE_BACKEND says; without it, `triton` for tensors on a CUDA or
    ROCm device and `torch` for all others. ValueError for an unknown name, and for a backend that cannot run here,
    with what it lacks.
    """
    if name == "auto":
        name = os.environ.get(VARIABLE) or "auto"
    if name == "auto":
        usable = torch.cuda.is_available() and find_spec("triton") is not None
        return _by_device() if usable else _load("torch")
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected auto, {', '.join(BACKENDS)}")
    if name == "triton":
        _check_triton()
    return _load(name)


def _check_triton() -> None:
    if find_spec("triton") is None:
        raise ValueError("backend triton: the package triton is missing, expected triton >= 3.5 (pip install triton)")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend triton: torch sees no CUDA or ROCm device (torch.cuda.is_available() is false), expected one, or "
            "TRITON_INTERPRET=1 for its interpreter; backend='torch' runs everywhere"
        )


def _load(name: str) -> Backend:
    module = import_module(f".{BACKENDS[name]}", __name__)
    return Backend(name, module.text_attention, module.visual_attention, module.attention_mass)


def _by_device() -> Backend:
    """`triton` for what its kernels take, `torch` for tensors elsewhere, for float64 and for wider heads."""
    from .triton_backend import can_run

    kernels, tiled = _load("triton"), _load("torch")

    def choose(operation: str):
        def call(query, *args):
            fits = query.device.type == "cuda" and can_run(query)
            return getattr(kernels if fits else tiled, operation)(query, *args)

        return call

    return Backend("auto", choose("text_attention"), choose("visual_attention"), choose("attention_mass"))


def fused_operations(x: torch.Tensor) -> ModuleType:
    """The module with the operations of `fused.py` for tensors like x: that one, or the one that launches kernels.

    Those are for 16 and 32-bit tensors on a GPU. While compiling it is the torch form: a compiler fuses that itself.
    """
    fits = x.device.type == "cuda" and x.dtype in _FUSED and not torch.compiler.is_compiling()
    return import_module(".fused_launches" if fits and find_spec("triton") else ".fused", __name__)
