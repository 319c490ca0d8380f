"""`vis-sparse search`: the best plan for a budget, measured on samples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..eval.data import records
from ..eval.progress import progress
from ..eval.tables import tight_table
from ..plans.atomic_write import replaced
from ..plans.layer_plan import PlanError, brief
from ..searching.pareto import Point, described, pareto, write_front
from .calibrate import (
    CheckpointOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    PromptOption,
    ReportOption,
    SamplesOption,
)
from .checks import output_file, output_folder
from .options import JsonOption, bar, emit


def search_command(
    model: CheckpointOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The plan's YAML file.", callback=output_file)],
    budget: Annotated[float, typer.Option(help="Share of the dense model's cost that the plan may have.")] = 0.25,
    cost: Annotated[
        str,
        typer.Option(
            help="visual or prefill (FLOPs of the decoder), kv (bytes), time (of the decoder's prefill, measured); all "
            "and all-time count the vision tower too and change its layers."
        ),
    ] = "visual",
    objective: Annotated[str, typer.Option(help="kl (to the dense model's answers) or accuracy.")] = "kl",
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What calibrate wrote.", show_default="made from the samples")
    ] = None,
    front: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also keep the Pareto front there.", callback=output_folder)
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="90s, 10m or 2h, after which nothing better is looked for. It does not bound the first ranking of all "
            "changes, nor the way down to the budget: every step is then the next best known.",
        ),
    ] = None,
    samples: SamplesOption = 256,
    prompt: PromptOption = None,
    page: ReportOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Find what visual tokens can do without, layer by layer, down to a budget.

    Stopped and started again, it goes on from what it has measured.
    """
    from ..calibration.measure import calibrate
    from ..calibration.samples import answered, encode, on_device
    from ..plans.scores import Calibration
    from ..searching.search import best_within, cost_of, search_front
    from .model import load_model

    seconds = _seconds(time_limit)
    measured = None if calibration is None else Calibration.load(calibration)
    loaded, processor = load_model(model, dtype, device)
    encoded = (on_device(encode(processor, record), loaded) for record in records(data, samples, prompt))
    chosen, points = [answered(loaded, sample, 16) for sample in encoded], []
    measured = measured or calibrate(loaded, chosen, data=Path(data).name, tower=cost_of(cost).tower)
    partial = out.with_name(out.name + ".partial")
    with progress("searching") as step:
        found = search_front(
            loaded,
            chosen,
            budget=budget,
            cost=cost,
            objective=objective,
            calibration=measured,
            time_limit=seconds,
            log=partial,
        )
        for point in found:
            points.append(point)
            if front is not None:
                write_front(front, points, cost)
            reached = min(point.cost for point in points)
            step(int(100 * (1 - max(reached, budget))), int(100 * (1 - budget)))
    best = best_within(points, budget, objective)
    with replaced(out) as new:
        new.write_text(described(best, cost).to_yaml())
    partial.unlink()
    if page is not None:
        from ..eval.calibration_page import write_report

        write_report(page, measured, points, cost)
    rows = [{"cost": point.cost, "kl": point.kl, "accuracy": point.accuracy} for point in pareto(points)]
    data_out = {"file": str(out), "cost": cost, "budget": budget, "steps": len(points) - 1, "front": rows}
    emit(data_out, json_file, lambda console: _draw(console, pareto(points), best, out))


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None:
        raise PlanError(f"time-limit: got {brief(text)}, expected like 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _draw(console: Console, front: list[Point], best: Point, out: Path) -> None:
    table = tight_table("cost", "", "KL", "accuracy", left=("",))
    for point in front[:: max(1, len(front) // 15)]:
        style = "bold" if point is best else ""
        cells = (f"{point.cost:.1%}", bar(point.cost), f"{point.kl:.4f}", f"{point.accuracy:.1%}")
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell, style=style) for cell in cells))
    console.print(table)
    console.print(f"{best.cost:.1%} of dense at KL {best.kl:.4f}, written to {out}", soft_wrap=True)
