"""`vis-sparse fit`: keys and values of visual rows under a plan, fitted to the dense model's, as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..eval.data import records
from .calibrate import CheckpointOption, DataOption, DeviceOption, DtypeOption, PromptOption, SamplesOption
from .checks import count, output_folder
from .options import JsonOption, bar, emit, scores_beside


def fit_command(
    model: CheckpointOption,
    data: DataOption,
    plan: Annotated[str, typer.Option("--plan", metavar="P", help="A shipped plan, or a YAML file.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Gets the adapter.", callback=output_folder)],
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="R",
            callback=count,
            help="Of what is added to a layer's keys, and to its values.",
            show_default="whole",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="From calibrate, for head and neuron budgets.", show_default="the checkpoint's own"
        ),
    ] = None,
    samples: SamplesOption = 64,
    prompt: PromptOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one call.", callback=count)] = 8,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Repair a plan without training: the weights of keys and values are fitted to the dense model's, in closed form.

    `vis_sparse.from_pretrained(FOLDER)` loads the model with the adapter merged, patched with the plan.
    """
    from ..calibration.fit import fit
    from ..calibration.samples import encode
    from .model import load_model

    chosen = records(data, samples, prompt)
    loaded, processor = load_model(model, dtype, device)
    encoded = (encode(processor, record) for record in chosen)
    found = fit(loaded, encoded, plan, rank=rank, calibration=calibration or scores_beside(model), batch=batch)
    found.save(out, loaded)
    summary = {
        "folder": str(out),
        "plan": found.plan.name,
        "layers": {
            str(layer): {"explained": share, "disturbed": found.disturbed[layer]}
            for layer, share in found.explained.items()
        },
    }
    emit(summary, json_file, lambda console: _draw(console, summary))


def _draw(console: Console, summary: dict) -> None:
    console.print("layer  error of visual keys and values that is gone, on samples left out; change of text's")
    for layer, row in summary["layers"].items():
        gone, text = row["explained"], row["disturbed"]
        shown = ("not measured: too few samples",) if gone is None else (bar(max(0.0, gone)), f" {gone:.0%}")
        console.print(f"{layer:>5}  ", *shown, f" {text:.1%}")
    console.print(f"wrote {summary['folder']}", soft_wrap=True)
