"""What the measuring commands print: tables, a progress bar, JSON."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def console_beside(json_file: str | None) -> Console:
    """Where tables go: stdout, or stderr if stdout is for the JSON."""
    return Console(stderr=json_file == "-")


def write_json(data, file: str) -> None:
    """Write `data` to `file`, or to stdout for "-"."""
    text = json.dumps(data, indent=2) + "\n"
    if file == "-":
        sys.stdout.write(text)
    else:
        Path(file).write_text(text)


@contextmanager
def progress(what: str):
    """A progress bar on stderr, as a function of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def bench_tables(results: list[dict]) -> list[Table]:
    """One table for prefill, and one for a decode step if it was measured, from the JSON objects of `bench`."""
    first = results[0]
    setting = (
        f"{first['model']}, {first['layers']} layers, {first['dtype']}, batch {first['batch']}, "
        f"{first['visual_tokens']} visual + {first['text_tokens']} text tokens"
    )
    machine = f"{first['machine']['cpu']}, {first['machine']['threads']} threads, torch {first['versions']['torch']}"
    tables = [_bench_table(f"Prefill: {setting}", results, "")]
    if "decode_dense_s" in first:
        tables.append(_bench_table(f"Decode step: {setting}", results, "decode_"))
    tables[-1].caption = (
        f"time: median of {first['repeats']} rounds in turns; rounds: fastest to slowest. Efficiency: speed-up over "
        f"FLOP ratio, against the unpatched model / the dense plan. {machine}, {first['date'][:10]}"
    )
    return tables


def _bench_table(title: str, results: list[dict], prefix: str) -> Table:
    first, prefill = results[0], not prefix
    table = plain_table(title, "plan", "time", "rounds", "speed-up", "FLOP ratio", "efficiency")
    if prefill:
        table.add_column("KV MB", justify="right")
        table.add_column("peak MB", justify="right")

    def add(name, row, kind, *ratios, sizes=()):
        times = seconds(row[prefix + kind]), _range(*row[prefix + "spread"][kind])
        table.add_row(name, *times, *ratios, *(megabytes(size) for size in sizes if prefill))

    add("unpatched", first, "dense_s", "1.00", "1.00", "", sizes=(first["kv_bytes_dense"], first["peak_bytes_dense"]))
    if all(row["plan"] != "dense" for row in results):
        speedup = f"{first[prefix + 'dense_s'] / first[prefix + 'dense_plan_s']:.2f}"
        add("dense plan", first, "dense_plan_s", speedup, "1.00", speedup)
    for row in results:
        speedup, flop_ratio, efficiency, over_dense = (
            f"{row[prefix + name]:.2f}" for name in ("speedup", "flop_ratio", "efficiency", "efficiency_vs_dense_plan")
        )
        sizes = (row["kv_bytes"], row["peak_bytes"])
        add(row["plan"], row, "patched_s", speedup, flop_ratio, f"{efficiency} / {over_dense}", sizes=sizes)
    return table


def plain_table(title: str, first: str, *headings: str) -> Table:
    """A table with a text column and number columns, narrow enough for 80 characters."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _range(fastest: float, slowest: float) -> str:
    factor = 1 if fastest >= 1 else 1e3
    return f"{fastest * factor:.3g}–{slowest * factor:.3g}"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def megabytes(value: int) -> str:
    return short(value / 1e6)


def short(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
