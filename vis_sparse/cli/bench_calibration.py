"""`vis-sparse bench calibration`: the table of what `calibrate` costs."""

from __future__ import annotations

from typing import Annotated

import typer

from ..eval.bench import DTYPES
from ..eval.bench_calibration import FORWARD, SAMPLES, TEXT, bench_calibration
from ..eval.numbers import seconds, span
from ..eval.progress import progress
from ..eval.tables import measured_on, tight_table
from .checks import count, one_of, torch_device
from .options import JsonOption, ModelOption, emit


def bench_calibration_command(
    model: ModelOption = "llava-1.5-7b",
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers to build.", callback=count)] = 2,
    samples: Annotated[int, typer.Option(min=1, help="Samples in a round.", callback=count)] = SAMPLES,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every way once.")] = 3,
    json_file: JsonOption = None,
) -> None:
    """Time `calibrate` with each kind of head scores against plain forward passes over the same samples."""
    one_of(dtype, DTYPES, "--dtype")
    torch_device(device)
    with progress("timing in turns") as on_turn:
        settings = {"layers": layers, "samples": samples, "dtype": dtype, "device": device, "repeats": repeats}
        results = bench_calibration(model, on_turn=on_turn, **settings)
    emit(results, json_file, lambda console: _draw(console, results))


def _draw(console, results: list[dict]) -> None:
    first = results[0]
    console.print(
        f"{first['model']}, {first['layers']} layers, {first['dtype']}, {first['samples']} samples of "
        f"{first['visual_tokens']} visual and {TEXT} text tokens"
    )
    table = tight_table("way", "time", "range", "to forward", "FLOPs to forward", left=("way",))
    for row in results:
        name = row["way"] if row["way"] == FORWARD else f"calibrate, {row['way']}"
        table.add_row(name, seconds(row["s"]), span(row["spread"]), f"{row['ratio']:.2f}", f"{row['flop_ratio']:.2f}")
    console.print(table)
    console.print(measured_on(first), style="bright_black", highlight=False)
