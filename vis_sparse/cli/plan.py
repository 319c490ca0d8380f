"""`vis-sparse plan`: which plans there are, and what one of them does to a model."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..cost.flops import CostReport, flops, resolved
from ..cost.shape_lookup import load_shape
from ..cost.shapes import ModelShape
from ..eval.numbers import human, mebibytes
from ..eval.tables import tight_table
from ..plans.files import load_plan, plan_names
from ..plans.layer_plan import LayerPlan, Neighborhood
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork, schedule
from .options import CalibrationOption, ConventionOption, JsonOption, ModelOption, bar, emit

plan_app = typer.Typer(no_args_is_help=True, help="List the shipped plans, or draw one.")


@plan_app.command("list", epilog="Example: vis-sparse plan list --model llava-1.5-13b")
def list_command(model: ModelOption = "llava-1.5-7b", json_file: JsonOption = None) -> None:
    """The shipped plans, and the share of a model's visual FLOPs that each one leaves (convention "paper")."""
    shape = load_shape(model)
    dense = flops(shape, "dense", convention="paper").total
    rows = []
    for name in plan_names():
        cost = flops(shape, name, convention="paper").total
        rows.append({"name": name, "about": load_plan(name).about, "visual_flops": cost, "share": cost / dense})

    def draw(console: Console) -> None:
        table = Table(title=f"Plans, and visual FLOPs of {shape.name}", title_justify="left")
        for heading in ("plan", "FLOPs", "of dense", "about"):
            table.add_column(heading, justify="right" if heading == "FLOPs" else "left", no_wrap=heading != "about")
        for row in rows:
            share = bar(row["share"], 6) + Text(f" {row['share']:4.0%}")
            table.add_row(row["name"], human(row["visual_flops"]), share, row["about"])
        console.print(table)

    emit({"model": shape.name, "plans": rows}, json_file, draw)


@plan_app.command("show", epilog="Example: vis-sparse plan show yopo-12 --model llava-1.5-7b")
def show_command(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A shipped plan, or a YAML file.")],
    model: ModelOption = "llava-1.5-7b",
    convention: ConventionOption = "executed",
    calibration: CalibrationOption = None,
    json_file: JsonOption = None,
) -> None:
    """Draw a plan on a model: what visual tokens do in each layer, and what that costs."""
    shape = load_shape(model)
    chosen = resolved(plan, shape, calibration)
    work = schedule(chosen, shape.heads, shape.kv_heads, shape.ffn)
    dense, cost = (flops(shape, each, convention=convention) for each in ("dense", chosen))
    rows = [
        {
            "layer": index,
            "visual_tokens": left,
            "text_reads": layer.text_reads,
            "attention": _attention_data(layer.attention),
            "heads": _head_count(layer, shape),
            "ffn": _ffn_share(layer, shape),
            "dense_flops": before.total,
            "flops": after.total,
        }
        for index, (layer, left, before, after) in enumerate(
            zip(chosen.layers, cost.visual_left, dense.prefill.layers, cost.prefill.layers, strict=True)
        )
    ]
    data = {
        "plan": chosen.name,
        "about": chosen.about,
        "semantics": chosen.semantics,
        "model": shape.name,
        "convention": convention,
        "layers": rows,
        "dense_flops": dense.total,
        "flops": cost.total,
        "dense_visual_flops": dense.prefill.lane("visual"),
        "visual_flops": cost.prefill.lane("visual"),
        "kv_bytes": cost.kv_bytes,
        "dense_kv_bytes": dense.kv_bytes,
    }
    emit(data, json_file, lambda console: _draw(console, chosen, shape, work, rows, dense, cost))


_NOTHING = Text("·", style="bright_black")


def _head_count(layer: LayerPlan, shape: ModelShape) -> int:
    return shape.heads if layer.heads is None else sum(layer.heads)


def _ffn_share(layer: LayerPlan, shape: ModelShape) -> float:
    return layer.ffn if isinstance(layer.ffn, float) else len(layer.ffn) / shape.ffn


def _attention_data(attention: str | Neighborhood) -> str | dict:
    return dataclasses.asdict(attention) if isinstance(attention, Neighborhood) else attention


def _attention_text(attention: str | Neighborhood) -> Text:
    if attention == "full":
        return Text("▦ full", style="yellow")
    if attention == "none":
        return Text("· none", style="bright_black")
    side = 2 * attention.radius + 1
    mark = "◰" if attention.direction == "causal" else "▣"
    frames = f", {attention.frames} frames" if attention.frames else ""
    stride = f", stride {attention.stride}" if attention.stride > 1 else ""
    return Text(f"{mark} {side}x{side} {attention.direction}{frames}{stride}", style="green")


def _work_cells(row: dict, layer: LayerPlan, item: LayerWork, shape: ModelShape) -> tuple[Text, Text, Text]:
    """The cells of attention, heads and FFN."""
    uses_heads = layer.text_reads or layer.attention != "none"
    heads = bar(row["heads"] / shape.heads, 6, "blue") + Text(f" {row['heads']}") if uses_heads else _NOTHING
    if layer.updates and not item.updates:  # no later layer reads the rows, so they are not updated any more
        return Text("· unread after", style="bright_black"), heads, _NOTHING
    ffn = bar(row["ffn"], 6, "cyan") + Text(f" {row['ffn']:.0%}") if row["ffn"] else _NOTHING
    return _attention_text(layer.attention), heads, ffn


def _draw(
    console: Console,
    plan: VisualPlan,
    shape: ModelShape,
    work: tuple[LayerWork, ...],
    rows: list[dict],
    dense: CostReport,
    cost: CostReport,
) -> None:
    console.print(Text(plan.name, style="bold") + Text(f" on {shape.name}: {plan.about}", style="not bold"))
    left = ("read", "attention", "heads", "FFN", "")
    drops = len(set(cost.visual_left)) > 1  # no room for both: the dense FLOPs are the same in all layers
    table = tight_table(
        "layer", "read", "attention", "heads", "FFN", "tokens" if drops else "dense", "plan", "", left=left
    )
    for row, layer, item in zip(rows, plan.layers, work, strict=True):
        share = row["flops"] / row["dense_flops"] if row["dense_flops"] else 0.0
        table.add_row(
            str(row["layer"]),
            Text("● text", style="magenta") if layer.text_reads else _NOTHING,
            *_work_cells(row, layer, item, shape),
            str(row["visual_tokens"]) if drops else human(row["dense_flops"]),
            human(row["flops"]),
            bar(share, 8, "red") + Text(f" {share:4.0%}"),
        )
    console.print(table)
    visual, whole = (each.prefill.lane("visual") for each in (cost, dense))
    console.print(
        f"{cost.visual_tokens} visual and {cost.text_tokens} text tokens, convention {cost.convention}: "
        f"{human(cost.total)} of {human(dense.total)} FLOPs ({cost.total / dense.total:.1%}), "
        f"KV cache {mebibytes(cost.kv_bytes)} of {mebibytes(dense.kv_bytes)}\n"
        f"For the visual tokens alone, as search --budget counts: {human(visual)} of {human(whole)} "
        f"({visual / whole:.1%})"
    )
