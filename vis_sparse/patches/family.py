"""What a model family tells: its classes, where its decoder is, and how a call shows where the images lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn

from ..layout.layout import VisualLayout


def outer_model(model: nn.Module) -> nn.Module:
    """transformers' multimodal classes: `model` of the class with the LM head, or the model itself without one."""
    return getattr(model, "model", model)


@dataclass(frozen=True)
class Family:
    """A family of models. `placeholders.family` makes one for processors that put a placeholder for each visual token.

    classes: names of the classes that `patch` takes. read_layout(outer, arguments, past): the layout of a call of the
    outer model, None if the call does not tell; positions count from the start of the sequence, `past` columns of
    which are cached. methods: of the outer model, replaced while it is patched: name -> function that wraps the
    class's own (unbound). outer_model(model): the module whose arguments tell the layout. text_model(outer): the
    decoder. auto_plan: the plan that "auto" stands for.
    """

    classes: tuple[str, ...]
    read_layout: Callable[[nn.Module, dict, int], VisualLayout | None]
    methods: Mapping[str, Callable[[Callable], Callable]] = field(default_factory=dict)
    outer_model: Callable[[nn.Module], nn.Module] = outer_model
    text_model: Callable[[nn.Module], nn.Module] = attrgetter("language_model")
    auto_plan: str = "auto"
