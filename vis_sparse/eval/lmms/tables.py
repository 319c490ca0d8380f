"""The results of `evaluate` as a table (Markdown, CSV, JSON, on the terminal) and as a picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from ..pareto import pareto_front
from ..tables import tight_table

INK, QUIET, ACCENT = "#1d2126", "#666d75", "#0a7c72"
_COLUMNS = {
    "task": str,
    "plan": str,
    "metric": str,
    "value": "{:.4f}".format,
    "stderr": "{:.4f}".format,
    "same_as_dense": "{:.1%}".format,
    "gflops": "{:.4g}".format,
    "of_dense": "{:.1%}".format,
    "kv_mib": "{:.4g}".format,
    "latency_ms": "{:.4g}".format,
    "speedup": "{:.2f}".format,
    "failed": str,
}
_HEADINGS = {
    "plan": "plan",
    "value": "value",
    "stderr": "±",
    "same_as_dense": "= dense",
    "gflops": "GFLOPs",
    "of_dense": "of dense",
    "kv_mib": "KV MiB",
    "latency_ms": "ms",
    "speedup": "speed-up",
    "failed": "failed",
}
NOTE = (
    "FLOPs: of the decoder in prefill, text included, counted on each sample's layout. KV: cache after prefill. "
    "Latency: of the whole answer, vision tower and decoding included. All means over samples. Speed-up: median over "
    "samples of the unpatched model's time over the plan's, timed in turns on the same input."
)


def _cells(row: dict) -> dict[str, str]:
    shown = {**row, "of_dense": _of_dense(row), "failed": len(row["failed"]) or None}
    return {name: "" if shown[name] is None else write(shown[name]) for name, write in _COLUMNS.items()}


def _of_dense(row: dict) -> float | None:
    return row["gflops"] / row["gflops_dense"] if row["gflops_dense"] else None


def write_tables(rows: list[dict], out: Path) -> None:
    """results.md, results.csv and results.json in `out`."""
    cells = [_cells(row) for row in rows]
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| --- " * len(_COLUMNS) + "|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in cells]
    failures = [f"- {line}" for line in _failures(rows)]
    text = "\n".join([*lines, "", NOTE, *(["", *failures] if failures else [])])
    (out / "results.md").write_text(text + "\n", "utf-8")
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "of_dense": _of_dense(row), "failed": len(row["failed"])} for row in rows)
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


def draw_table(console: Console, rows: list[dict]) -> None:
    """One table a task and metric, 80 columns wide."""
    for (task, metric), own in _by_metric(rows).items():
        cells = [_cells(row) for row in own]
        used = [name for name in _HEADINGS if any(row[name] for row in cells)]
        table = tight_table(*(_HEADINGS[name] for name in used), left=("plan",), title=f"\n{task}: {metric}")
        for row in cells:
            table.add_row(*(row[name] for name in used))
        console.print(table)
    console.print(f"\n{NOTE}", style="bright_black", highlight=False)
    for line in _failures(rows):
        console.print(line, style="red", highlight=False)


def _by_metric(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    found = {}
    for row in rows:
        found.setdefault((row["task"], row["metric"]), []).append(row)
    return found


def _failures(rows: list[dict]) -> list[str]:
    lines = (
        f"{row['task']}, {row['plan']}: sample {number} counts as wrong: {error}"
        for row in rows
        for number, error in row["failed"].items()
    )
    return list(dict.fromkeys(lines))  # a task with several metrics has several rows


def pareto(rows: list[dict], file: Path) -> None:
    """A picture (PNG): each task's metrics over FLOPs; the line joins the plans that no other beats in both."""
    panels = _by_metric([row for row in rows if row["gflops"] is not None])
    columns = max(1, min(3, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, ((task, metric), points) in zip(grid, panels.items()):
        _draw_panel(axes, points)
        axes.set_title(f"{task}: {metric}", fontsize=9, color=INK, loc="left")
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(file)


def _draw_panel(axes, points: list[dict]) -> None:
    best = pareto_front(points)
    axes.plot([p["gflops"] for p in best], [p["value"] for p in best], color=ACCENT, linewidth=1, zorder=1)
    for point in points:
        on_front = point in best
        axes.errorbar(
            point["gflops"],
            point["value"],
            yerr=point["stderr"],
            fmt="o",
            markersize=5,
            elinewidth=0.8,
            color=ACCENT if on_front else QUIET,
        )
        axes.annotate(
            point["plan"], (point["gflops"], point["value"]), xytext=(5, 5), textcoords="offset points", fontsize=7.5
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("GFLOPs of prefill a sample", fontsize=8, color=QUIET)
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
