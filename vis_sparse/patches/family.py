"""What a model family tells: its classes, where its decoder is, and how a call shows where the images lie."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch
from torch import nn

from ..layout.layout import VisualLayout
from .tower import TowerKind

_NO_LABEL = -100


@dataclass
class Running:
    """What is known of a call while it runs. prompt_ends: (batch or 1,) columns behind the prompts. plan: its name.
    said: by modality, what the vision tower said of its tokens, (tokens,)."""

    layout: VisualLayout | None = None
    plan: str | None = None
    prompt_ends: np.ndarray | None = None
    said: dict[str, np.ndarray] = field(default_factory=dict)


@torch.compiler.disable
def bound(function: Callable, owner: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Arguments by name of a call of a method, given unbound; those in its `**kwargs` too."""
    if not args:
        return kwargs
    arguments = _signature(function).bind_partial(owner, *args, **kwargs).arguments
    return arguments | arguments.pop("kwargs", {})


_signature = functools.cache(inspect.signature)


@torch.compiler.disable
def prompt_ends(labels: torch.Tensor) -> np.ndarray:
    """(batch,) the column of each sample's first label, or the number of columns."""
    answers = (labels != _NO_LABEL).cpu().numpy()
    return np.where(answers.any(1), answers.argmax(1), answers.shape[1])


def outer_model(model: nn.Module) -> nn.Module:
    """transformers' multimodal classes: `model` of the class with the LM head, or the model itself without one."""
    return getattr(model, "model", model)


def fits(outer: nn.Module) -> None:
    """No model of the classes is refused."""


def one(outer: nn.Module) -> int:
    """Every patch is a token."""
    return 1


@dataclass(frozen=True)
class Family:
    """A family of models. `placeholders.family` makes one for processors that put a placeholder for each visual token.

    classes: names of the classes that `patch` takes. read_layout(outer, arguments, past): the layout of a call of the
    outer model, None if the call does not tell; positions count from the start of the sequence, `past` columns of
    which are cached. methods: of the outer model, replaced while it is patched: name -> function of the
    patch's state, what stood there, and the call's arguments. outer_model(model): the module whose arguments tell the
    layout. text_model(outer): the decoder. auto_plan: the plan that "auto" stands for. check(outer): raises PatchError
    for a model of these classes that the family does not know how to read. towers: the kinds of vision encoders that
    run under a plan's tower section. merge(outer): patches on a side of a token. not_before: orders of
    `TokensBefore` that its tokens cannot be chosen by, and why.
    """

    classes: tuple[str, ...]
    read_layout: Callable[[nn.Module, dict, int], VisualLayout | None]
    methods: Mapping[str, Callable] = field(default_factory=dict)
    outer_model: Callable[[nn.Module], nn.Module] = outer_model
    text_model: Callable[[nn.Module], nn.Module] = attrgetter("language_model")
    auto_plan: str = "auto"
    check: Callable[[nn.Module], None] = fits
    towers: tuple[TowerKind, ...] = ()
    merge: Callable[[nn.Module], int] = one
    not_before: Mapping[str, str] = field(default_factory=dict)
