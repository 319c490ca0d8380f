"""What a plan leaves out, as numbers: for the log line at start, and for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .kinds import ALL, TEXT, LayerKinds
from .settings import TextShape


@dataclass(frozen=True)
class Savings:
    """Of one plan, for one visual token, over all layers.

    attention_rows: layers whose attention it does not enter as a query. ffn_rows: FFN rows it leaves out, a layer's
    whole FFN is 1. keys: layers that hold no key of it.
    """

    layers: int
    attention_rows: int
    ffn_rows: float
    keys: int

    @classmethod
    def of(cls, layers: Sequence[LayerKinds], plan: int, ffn_size: int) -> Savings:
        kinds = np.array([layer.attention[plan] for layer in layers])
        used = [layer.neurons[plan] for layer in layers]
        neurons = sum(each if isinstance(each, int) else len(each) for each in used)
        return cls(len(layers), int((kinds != ALL).sum()), len(layers) - neurons / ffn_size, int((kinds == TEXT).sum()))

    def line(self, name: str) -> str:
        """For the log."""
        return (
            f"plan {name!r} leaves out, of each visual token, {self.attention_rows} of {self.layers} attention rows, "
            f"{self.ffn_rows:.1f} of {self.layers} FFN rows, and its keys in {self.keys} of {self.layers} layers"
        )


def savings_of(layers: Sequence[LayerKinds], plans: int, shape: TextShape) -> list[Savings]:
    return [Savings.of(layers, plan, shape.ffn) for plan in range(plans)]
