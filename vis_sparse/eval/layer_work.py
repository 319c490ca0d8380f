"""What a plan leaves to compute in each layer, as plain data for pictures."""

from __future__ import annotations

import numpy as np

import vis_sparse

from ..cost.shapes import ModelShape
from ..kernels.patterns import visible
from ..layout.layout import VisualLayout
from ..layout.packing import visual_coordinates
from ..plans.layer_plan import Neighborhood
from ..plans.plan import VisualPlan
from ..plans.schedule import schedule


def layer_work(shape: ModelShape, plan: VisualPlan, layout: VisualLayout, text_tokens: int) -> list[dict]:
    """One dict a layer, for a plan with its heads resolved and a layout of one sample.

    share: FLOPs of the visual tokens over those of the dense layer. reads: text reads visual tokens. heads, ffn: share
    of the query heads and FFN neurons that visual tokens use. window: in words. seen: visual tokens (raster indices)
    of the last segment (of tiles, the thumbnail) that the token in its middle attends to.
    """

    def visual_flops(of: VisualPlan) -> list[int]:
        report = vis_sparse.flops(shape, of, layout=layout, text_tokens=text_tokens, convention="executed")
        return [layer.visual.total for layer in report.prefill.layers]

    segment = layout.segments[-1]
    tokens = visual_coordinates(layout).take(slice(-segment.size, None))
    middle = tokens.take([segment.height // 2 * segment.width + segment.width // 2])
    dense = visual_flops(VisualPlan.dense(shape.layers))
    rows = []
    for work, cost, whole in zip(
        schedule(plan, shape.heads, shape.kv_heads, shape.ffn), visual_flops(plan), dense, strict=True
    ):
        neurons = work.neurons if isinstance(work.neurons, int) else len(work.neurons)
        rows.append(
            {
                "share": cost / whole,
                "reads": work.reads,
                "heads": len(work.value_heads) / shape.heads if cost else 0.0,
                "ffn": neurons / shape.ffn,
                "window": _words(work.attention) if work.query_heads else "none",
                "seen": np.flatnonzero(visible(work.attention, middle, tokens)).tolist() if work.query_heads else [],
            }
        )
    return rows


def _words(attention: str | Neighborhood) -> str:
    if not isinstance(attention, Neighborhood):
        return "dense"
    side = 2 * attention.radius + 1
    return f"{side}×{side}" + (" before" if attention.direction == "causal" else "")


def of_thumbnail(model: dict) -> str:
    """Which visual tokens pictures show, where it is not all of them."""
    return " of the thumbnail" if model["has_tiles"] else ""


def outline(cells: list[int], width: int) -> list[tuple[int, int, int, int]]:
    """Border of a set of grid cells (raster indices in rows of `width`): unit edges (x0, y0, x1, y1)."""
    inside = {(cell // width, cell % width) for cell in cells}
    edges = []
    for y, x in inside:
        if (y - 1, x) not in inside:
            edges.append((x, y, x + 1, y))
        if (y + 1, x) not in inside:
            edges.append((x, y + 1, x + 1, y + 1))
        if (y, x - 1) not in inside:
            edges.append((x, y, x, y + 1))
        if (y, x + 1) not in inside:
            edges.append((x + 1, y, x + 1, y + 1))
    return sorted(edges)


def runs_in_words(layers: list[dict]) -> str:
    """A plan's layers in one line, equal ones together, like "0-3: 7×7 before; 4-5: frozen; 6-7: off"."""
    parts = []
    for first, words in enumerate(_layer_in_words(layer) for layer in layers):
        if parts and parts[-1][2] == words:
            parts[-1][1] = first
        else:
            parts.append([first, first, words])
    return "; ".join(f"{first if first == last else f'{first}-{last}'}: {words}" for first, last, words in parts)


def _layer_in_words(layer: dict) -> str:
    if layer["share"] == 0:
        return "off"
    words = [layer["window"] if layer["seen"] else "no visual attention" if layer["ffn"] else "frozen"]
    if layer["heads"] < 1:
        words.append(f"{layer['heads']:.0%} of heads")
    if 0 < layer["ffn"] < 1:
        words.append(f"{layer['ffn']:.0%} of FFN")
    if not layer["reads"]:
        words.append("not read by text")
    return ", ".join(words)
