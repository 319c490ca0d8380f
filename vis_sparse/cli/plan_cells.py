"""What a layer's plan looks like in a table, and a tower section as a table of its own."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.text import Text

from ..cost.report import CostReport
from ..cost.shapes import ModelShape
from ..eval.numbers import human
from ..eval.tables import tight_table
from ..plans.before import TokensBefore
from ..plans.layer_plan import LayerPlan, Neighborhood
from ..plans.plan import VisualPlan
from .options import bar

NOTHING = Text("·", style="bright_black")


def head_count(layer: LayerPlan, heads: int) -> int:
    return heads if layer.heads is None else sum(layer.heads)


def ffn_share(layer: LayerPlan, neurons: int) -> float:
    return layer.ffn if isinstance(layer.ffn, float) else len(layer.ffn) / neurons


def attention_data(attention: str | Neighborhood) -> str | dict:
    return dataclasses.asdict(attention) if isinstance(attention, Neighborhood) else attention


def attention_text(attention: str | Neighborhood) -> Text:
    if attention == "full":
        return Text("▦ full", style="yellow")
    if attention == "none":
        return Text("· none", style="bright_black")
    side = 2 * attention.radius + 1
    mark = "◰" if attention.direction == "causal" else "▣"
    frames = f", {attention.frames} frames" if attention.frames else ""
    stride = f", stride {attention.stride}" if attention.stride > 1 else ""
    return Text(f"{mark} {side}x{side} {attention.direction}{frames}{stride}", style="green")


def before_text(before: TokensBefore, cost: CostReport) -> str:
    """Which tokens come into the decoder, in words."""
    if before.keep is None:
        within = f" within {before.tolerance:g}" if before.tolerance else ""
        return f"Before the vision tower, duplicates of their neighbours{within} leave: how many, pixels decide"
    entered = f"{cost.visual_left[0]} of {cost.visual_tokens} visual tokens"
    return f"Before the decoder, {before.keep:.0%} by {before.by}: {entered} come into the first layer"


def tower_rows(tower: VisualPlan, shape: ModelShape, dense: CostReport, cost: CostReport) -> list[dict]:
    """The layers of a tower section as plain data; FLOPs are None where a convention does not count them."""
    vision, rows = shape.vision, []
    for index, layer in enumerate(tower.layers):
        counted = cost.prefill.tower_layers
        before, after = ((each.prefill.tower_layers[index].total if counted else None) for each in (dense, cost))
        rows.append(
            {
                "layer": index,
                "off": layer == LayerPlan.off(),
                "is_read": index < vision.layers_read,
                "attention": attention_data(layer.attention),
                "heads": head_count(layer, vision.heads),
                "ffn": ffn_share(layer, vision.ffn),
                "tokens": None if layer.tokens is None else dataclasses.asdict(layer.tokens),
                "dense_flops": before,
                "flops": after,
            }
        )
    return rows


def draw_tower(console: Console, tower: VisualPlan, shape: ModelShape, rows: list[dict]) -> None:
    """What patches do in each layer of the vision tower, and what that costs."""
    left = ("attention", "heads", "FFN", "tokens", "")
    table = tight_table("layer", "attention", "heads", "FFN", "tokens", "plan", "", left=left, title="vision tower")
    for row, layer in zip(rows, tower.layers, strict=True):
        share = row["flops"] / row["dense_flops"]
        cost = human(row["flops"]), bar(share, 8, "red") + Text(f" {share:4.0%}")
        if row["off"] or not row["is_read"]:
            why = "off" if row["off"] else "not read"
            table.add_row(str(row["layer"]), Text(f"· {why}", style="bright_black"), *[NOTHING] * 3, *cost)
            continue
        heads = bar(row["heads"] / shape.vision.heads, 6, "blue") + Text(f" {row['heads']}")
        ffn = bar(row["ffn"], 6, "cyan") + Text(f" {row['ffn']:.0%}") if row["ffn"] else NOTHING
        tokens = NOTHING if layer.tokens is None else Text(f"{layer.tokens.keep:.0%} by {layer.tokens.by}")
        table.add_row(str(row["layer"]), attention_text(layer.attention), heads, ffn, tokens, *cost)
    console.print(table)
