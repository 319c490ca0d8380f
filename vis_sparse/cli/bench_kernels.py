"""`vis-sparse bench kernels`: the table of visual attention in every backend."""

from __future__ import annotations

from typing import Annotated

import typer

from ..eval.bench import DTYPES
from ..eval.bench_kernels import SETTINGS, bench_kernels
from ..eval.numbers import seconds
from ..eval.progress import progress
from ..eval.tables import tight_table
from ..plans.layer_plan import DIRECTIONS
from .checks import counts, one_of, torch_device
from .options import JsonOption, emit

WAYS = ("dense", "torch", "flex", "triton", "natten", "reference")


def bench_kernels_command(
    settings: Annotated[str, typer.Option(metavar="A,B,...", help=", ".join(SETTINGS) + ".")] = "24x24,48x48",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Samples.")] = "1",
    radius: Annotated[str, typer.Option(metavar="R,...", help="Radius of the windows.")] = "2,7",
    direction: Annotated[str, typer.Option(help="both or causal.")] = "both",
    ways: Annotated[str | None, typer.Option(metavar="A,B,...", help=", ".join(WAYS) + ".")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    most_heads: Annotated[int | None, typer.Option(min=1, help="Query heads, if fewer than the model's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every way once.")] = 3,
    json_file: JsonOption = None,
) -> None:
    """Time visual attention in every backend, with its error, against dense attention over all tokens.

    Useful FLOP/s count each pair that is read once; of ideal: speed-up over dense, by the share of pairs that is read.
    """
    names = list(SETTINGS) if settings == "all" else [name.strip() for name in settings.split(",")]
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        expected = f"expected all or some of {', '.join(SETTINGS)}"
        raise typer.BadParameter(f"got {unknown[0]!r}, {expected}", param_hint="--settings")
    batches, radii = counts(batch, 1, "--batch"), counts(radius, 0, "--radius")
    chosen = None if ways is None else [one_of(way.strip(), WAYS, "--ways") for way in ways.split(",")]
    one_of(direction, DIRECTIONS, "--direction")
    one_of(dtype, DTYPES, "--dtype")
    torch_device(device)
    with progress("timing in turns") as on_turn:
        results = bench_kernels(
            names,
            batches,
            radii,
            ways=chosen,
            direction=direction,
            device=device,
            dtype=dtype,
            most_heads=most_heads,
            repeats=repeats,
            on_turn=on_turn,
        )
    emit(results, json_file, lambda console: _draw(console, results))


def _draw(console, results: list[dict]) -> None:
    headings = ("setting", "batch", "radius", "way", "time", "TFLOP/s", "speed-up", "of ideal", "error")
    table = tight_table(*headings, left=("setting", "way"))
    before = None
    for row in results:
        case = (row["setting"], str(row["batch"]), str(row["radius"]))
        table.add_row(
            *(case if case != before else ("", "", "")),
            row["way"],
            seconds(row["seconds"]),
            f"{row['useful_flops_per_second'] / 1e12:.3g}",
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}",
            "-" if row["share_of_ideal"] is None else f"{row['share_of_ideal']:.0%}",
            "-" if row["error"] is None else f"{row['error']:.0e}",
        )
        before = case
    console.print(table)
    machine, facts = results[0]["machine"], results[0]["versions"]
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['device']}, torch {facts['torch']}, "
        f"{results[0]['dtype']}, {results[0]['date'][:10]}",
        style="bright_black",
        highlight=False,
    )
