"""What a plan leaves out, as numbers: for the log line at start, and for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cost.flops import flops
from ..cost.shape_config import shape_of_config
from ..layout.image_grids import ShapeError
from ..plans.plan import VisualPlan
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


def of_one_image(config, plan: VisualPlan, text_tokens: int = 64) -> str:
    """For the log: what a prompt of one image, of the size that the model's `config` says, costs under `plan`.

    Empty for a model whose images the cost model does not know.
    """
    try:
        shape = shape_of_config(config, config.model_type)
        ours, dense = (flops(shape, each, text_tokens=text_tokens) for each in (plan, "dense"))
    except ShapeError:
        return ""
    return (
        f"; of a prompt of one image ({ours.visual_tokens} visual tokens) and {text_tokens} text tokens it computes "
        f"{100 * ours.prefill.total / dense.prefill.total:.1f} % of the decoder's FLOPs"
    )


def savings_of(layers: Sequence[LayerKinds], plans: int, shape: TextShape) -> list[Savings]:
    return [Savings.of(layers, plan, shape.ffn) for plan in range(plans)]
