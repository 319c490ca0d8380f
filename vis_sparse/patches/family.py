"""What a model family tells: its classes, where its decoder is, and how a call shows where the images lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..layout import VisualLayout


@dataclass(frozen=True)
class Family:
    """A family of models.

    classes: names of the transformers classes that `patch` takes. outer_model(model): the module whose arguments tell
    the layout and that holds the text model as `language_model`. read_layout(outer, arguments, past): the layout of a
    call of it, None if the call does not tell; positions count from the start of the sequence, `past` columns of which
    are cached. auto_plan: the plan that "auto" stands for.
    """

    classes: tuple[str, ...]
    outer_model: Callable[[nn.Module], nn.Module]
    read_layout: Callable[[nn.Module, dict, int], VisualLayout | None]
    auto_plan: str = "auto"
