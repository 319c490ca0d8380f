"""`vis-sparse plan`: which plans there are, and what one of them does to a model."""

from __future__ import annotations

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
from ..plans.layer_plan import LayerPlan
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork, schedule
from .flops import whole_prefill
from .options import CalibrationOption, ConventionOption, JsonOption, ModelOption, bar, emit
from .plan_cells import (
    NOTHING,
    attention_data,
    attention_text,
    before_text,
    draw_tower,
    ffn_share,
    head_count,
    tower_rows,
)

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
            "attention": attention_data(layer.attention),
            "heads": head_count(layer, shape.heads),
            "ffn": ffn_share(layer, shape.ffn),
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
        "before": None if chosen.before is None else chosen.before.to_data(),
        "tower": None if chosen.tower is None else tower_rows(chosen.tower, shape, dense, cost),
        "prefill_flops": cost.prefill.whole if cost.prefill.is_whole else None,
        "dense_prefill_flops": dense.prefill.whole if dense.prefill.is_whole else None,
    }

    def draw(console: Console) -> None:
        _draw(console, chosen, shape, work, rows, dense, cost)
        if cost.prefill.is_whole:
            if chosen.tower is not None:
                draw_tower(console, chosen.tower, shape, data["tower"])
            console.print(whole_prefill(cost, dense))

    emit(data, json_file, draw)


def _work_cells(row: dict, layer: LayerPlan, item: LayerWork, shape: ModelShape) -> tuple[Text, Text, Text]:
    """The cells of attention, heads and FFN."""
    uses_heads = layer.text_reads or layer.attention != "none"
    heads = bar(row["heads"] / shape.heads, 6, "blue") + Text(f" {row['heads']}") if uses_heads else NOTHING
    if layer.updates and not item.updates:  # no later layer reads the rows, so they are not updated any more
        return Text("· unread after", style="bright_black"), heads, NOTHING
    ffn = bar(row["ffn"], 6, "cyan") + Text(f" {row['ffn']:.0%}") if row["ffn"] else NOTHING
    return attention_text(layer.attention), heads, ffn


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
    # no room for both: the dense FLOPs are the same in all layers
    drops = len({cost.visual_tokens, *cost.visual_left}) > 1
    table = tight_table(
        "layer", "read", "attention", "heads", "FFN", "tokens" if drops else "dense", "plan", "", left=left
    )
    for row, layer, item in zip(rows, plan.layers, work, strict=True):
        share = row["flops"] / row["dense_flops"] if row["dense_flops"] else 0.0
        table.add_row(
            str(row["layer"]),
            Text("● text", style="magenta") if layer.text_reads else NOTHING,
            *_work_cells(row, layer, item, shape),
            str(row["visual_tokens"]) if drops else human(row["dense_flops"]),
            human(row["flops"]),
            bar(share, 8, "red") + Text(f" {share:4.0%}"),
        )
    console.print(table)
    if plan.before is not None:
        console.print(before_text(plan.before, cost))
    visual, whole = (each.prefill.lane("visual") for each in (cost, dense))
    console.print(
        f"{cost.visual_tokens} visual and {cost.text_tokens} text tokens, convention {cost.convention}: "
        f"{human(cost.total)} of {human(dense.total)} FLOPs ({cost.total / dense.total:.1%}), "
        f"KV cache {mebibytes(cost.kv_bytes)} of {mebibytes(dense.kv_bytes)}\n"
        f"For the visual tokens alone, as search --budget counts: {human(visual)} of {human(whole)} "
        f"({visual / whole:.1%})"
    )
