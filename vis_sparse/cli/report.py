"""`vis-sparse report`: the results of `eval`, `bench` and `bench --peers` as one self-contained page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..plans.atomic_write import written
from ..plans.layer_plan import brief, reason
from .checks import output_file
from .options import JsonOption, emit
from .report_rows import wrong

# what an object of a kind is known by
MARKS = {"eval": ("task", "plan", "metric"), "peers": ("peer",), "bench": ("plan", "flop_ratio")}


def read_results(files: list[Path]) -> dict[str, list[dict]]:
    """The rows of every file, by kind (`MARKS`). Raises typer.BadParameter for a file that holds none."""
    kinds: dict[str, list[dict]] = {kind: [] for kind in MARKS}
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _refusal(file, f"a JSON file ({reason(error)})") from None
        rows = data if isinstance(data, list) else [data]
        kind = _kind(rows)
        if kind is None:
            raise _refusal(file, "the JSON of eval, bench or bench --peers")
        for number, row in enumerate(rows):
            problem = wrong(row, kind)
            if problem:
                raise _refusal(file, f"the JSON of {kind} (row {number}: {problem})")
        kinds[kind] += rows
    return kinds


def _refusal(file: Path, expected: str) -> typer.BadParameter:
    return typer.BadParameter(f"got {brief(str(file))}, expected {expected}", param_hint="RESULTS")


def _kind(rows: list) -> str | None:
    if not rows or not all(isinstance(row, dict) for row in rows):
        return None
    return next((kind for kind, keys in MARKS.items() if all(key in row for row in rows for key in keys)), None)


def report_command(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="JSON of eval, bench, bench --peers.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.", callback=output_file)] = Path("report.html"),
    calibration: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="From vis-sparse calibrate: heat maps. May be repeated.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """One HTML page from measured results: tables, accuracy over FLOPs, head heat maps, every plan layer by layer."""
    from ..eval.report_page import page
    from ..plans.scores import Calibration

    kinds = read_results(results)
    maps = [Calibration.load(file) for file in calibration or ()]
    written(out).write_text(page(kinds, maps), encoding="utf-8")
    counts = {kind: len(rows) for kind, rows in kinds.items()}
    emit({"page": str(out), "rows": counts}, json_file, lambda console: console.print(f"written: {out}"))
