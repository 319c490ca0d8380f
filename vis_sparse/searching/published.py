"""The published methods as chains of plans from cheap to dear, fitted to a model as their papers do or better."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..plans.layer_plan import HeadBudget, LayerPlan, Neighborhood
from ..plans.plan import VisualPlan, with_layer
from ..plans.scores import keep_heads

# causal: the official windows read ahead, which unmodified weights have never done
_NEAR = Neighborhood(2, "causal")
_YOPO_SHARES = np.arange(1, 17) / 16


def chains(scores: np.ndarray, num_kv_heads: int, loss: Callable[[VisualPlan], float]) -> dict[str, list[VisualPlan]]:
    """Plans by method. Layers are ranked by the loss that the method's change brings in that layer alone; heads by
    scores (layers, heads)."""
    layers = len(scores)
    dense = VisualPlan.dense(layers)

    def ranked(layer: LayerPlan) -> list[int]:
        """Layers by what `layer` does to the answers there, least first."""
        return np.argsort([loss(with_layer(dense, index, layer)) for index in range(layers)], kind="stable").tolist()

    frozen = ranked(LayerPlan(attention="none", ffn=0.0))
    skipped = ranked(LayerPlan(attention="none"))
    unread = ranked(LayerPlan(text_reads=False))
    counts = range(layers + 1)
    return {
        "YOPO, uniform": [_uniform(scores, num_kv_heads, float(share)) for share in _YOPO_SHARES],
        "VTW": [VisualPlan.vtw(layers, count) for count in counts],
        "ViCA": [VisualPlan.vica(layers, unread[::-1][:count]) for count in counts],
        "ShortV": [VisualPlan.shortv(layers, frozen[: layers - count]) for count in counts],
        "V-Skip": [VisualPlan.vskip(layers, skipped[: layers - count]) for count in counts],
    }


def _uniform(scores: np.ndarray, num_kv_heads: int, share: float) -> VisualPlan:
    """The same share of heads and of neurons in every layer, and neighbours only."""
    masks = keep_heads(scores, HeadBudget(share), num_kv_heads).tolist()
    return VisualPlan(tuple(LayerPlan(True, _NEAR, tuple(mask), share) for mask in masks), "yopo")
