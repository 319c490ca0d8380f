"""What the commands have in common: options, the `--json` convention, and how numbers are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..heads import resolve_heads
from ..plan import VisualPlan
from ..plan_yaml import as_plan
from ..shapes import ModelShape

JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - = stdout.")]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="NAME", help="A shipped model shape, or a folder with a config.json.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="What calibrate wrote: which heads and neurons budgets keep.",
        show_default="the first ones",
    ),
]
ConventionOption = Annotated[
    str, typer.Option("--convention", help="executed (text included), paper, macs or fastv (visual tokens only).")
]


def resolved(plan: str, shape: ModelShape, calibration: Path | None) -> VisualPlan:
    """A plan (name or file) for a model, its budgets resolved by the calibration; without one the first heads and
    neurons stand in, whose numbers are right."""
    heads = "first" if calibration is None else None
    return resolve_heads(as_plan(plan, shape.layers), shape.heads, shape.kv_heads, heads, calibration)


def report(data, json_file: str | None, draw: Callable[[Console], None]) -> None:
    """Give a command's result back: `data` as JSON if a file was asked for, and drawn unless JSON has stdout."""
    if json_file is not None:
        text = json.dumps(data, indent=2) + "\n"
        if json_file == "-":
            sys.stdout.write(text)
            return
        Path(json_file).write_text(text)
    draw(Console())


def tight_table(*headings: str, left: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table without lines that fits 80 columns; numbers to the right, the columns named in `left` to the left."""
    table = Table(
        title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False, header_style="bright_black"
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


def human(count: float) -> str:
    """`count` with a decimal prefix and four digits: 7634300000000 -> "7.634 T"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f} {prefix}"
    return f"{count:.0f}"


def mebibytes(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:,.1f} MiB"


def bar(share: float, width: int = 10, style: str = "cyan") -> Text:
    """A bar of `width` cells, `share` of it filled; anything above 0 shows at least an eighth of a cell."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    filled = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return Text(filled, style=style) + Text("·" * (width - len(filled)), style="bright_black")
