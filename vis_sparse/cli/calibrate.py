"""`vis-sparse calibrate`: what a model's visual tokens need, measured on samples and written to one file."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from ..calibration.measure import calibrate
from ..eval.data import TASKS, TINY, records
from ..eval.progress import progress
from ..eval.tiny import SHIPPED
from ..plans.atomic_write import written
from ..plans.measured import KEY as MEASURED
from ..plans.measured import MeasuredPlan, from_text
from ..plans.scores import Calibration
from .checks import count, output_file
from .heatmap import draw_heads
from .options import JsonOption, emit, folder_of

DataOption = Annotated[
    str,
    typer.Option(
        metavar="D",
        help="A .jsonl or .parquet file with image, question and perhaps answer, an image folder (with --prompt), "
        f"{TASKS}TASK for a task of lmms-eval, or {' or '.join(TINY)}: training images of a shipped tiny model.",
    ),
]
CheckpointOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="M",
        help=f"A transformers checkpoint or its name; {', '.join(SHIPPED)}: shipped.",
        callback=folder_of,
    ),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Samples to use.", callback=count)]
PromptOption = Annotated[str | None, typer.Option(help="The question to every image of a folder.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", help="Also draw it: an HTML page, with its PNGs beside it.", callback=output_file
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, ...")]


def calibrate_command(
    model: CheckpointOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .safetensors file to write.", callback=output_file)],
    samples: SamplesOption = 64,
    prompt: PromptOption = None,
    scores: Annotated[
        str, typer.Option(help="Head scores: effects (on the answer), or mass (the paper's, cheaper).")
    ] = "effects",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also measure what each layer is to the answers (slower).")
    ] = False,
    tower: Annotated[
        bool, typer.Option("--tower", help="Also measure the vision tower, for plans with a section for it (slower).")
    ] = False,
    plans: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Also search plans for so long on half of the samples, and measure them on the others: what "
            "patch(model, 'auto', calibration=...) chooses from.",
            show_default="none",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the model's own answer, where data has none.")] = 16,
    export_mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write active heads as .npy, the official masks' format.", callback=output_file
        ),
    ] = None,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Share of the heads of layers 2- in that mask.")] = 0.25,
    dtype: DtypeOption = "float32",
    page: ReportOption = None,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Measure who reads visual tokens and what layers do to them. Stopped and started again, it goes on.

    `accelerate launch -m vis_sparse calibrate ...` shares the samples out among processes.
    """
    from ..calibration import processes
    from ..calibration.samples import encode
    from .launch import join
    from .model import load_model

    chosen = records(data, samples, prompt)
    device, reports = join(device)
    total = -(-len(chosen) // processes.place()[1])
    loaded, processor = load_model(model, dtype, device)
    with progress("calibrating") if reports else nullcontext(lambda done, total: None) as step:
        result = calibrate(
            loaded,
            (encode(processor, record) for record in chosen),
            scores=scores,
            sensitivity=sensitivity,
            tower=tower,
            max_new_tokens=max_new_tokens,
            out=out,
            on_sample=lambda done: step(done, total),
            data=Path(data).name,
        )
    if not reports:
        return
    if plans is not None:
        from ..searching.measured import with_measured_plans

        encoded = (encode(processor, record) for record in chosen)
        result = with_measured_plans(result, loaded, encoded, time_limit=plans)
        result.save(out)
    if export_mask is not None:
        np.save(written(export_mask.with_suffix(".npy")), result.masks(keep))
    if page is not None:
        from ..eval.calibration_page import write_report

        write_report(page, result)
    emit(_summary(result, out), json_file, lambda console: _draw(console, result, out))


def _summary(calibration: Calibration, out: Path) -> dict:
    return {
        "file": str(out),
        "samples": calibration.num_samples,
        **{name: text for name, text in calibration.metadata.items() if name != MEASURED},
        "plans": [[each.cost, each.kl, each.accuracy] for each in _measured(calibration)],
        "head_scores": calibration.heads.tolist(),
        "text_mass": calibration.text_mass.tolist(),
        "attention_change": calibration.attention_change.tolist(),
        "ffn_change": calibration.ffn_change.tolist(),
        **({} if calibration.tower is None else {"tower_head_scores": calibration.tower.heads.tolist()}),
    }


def _draw(console: Console, calibration: Calibration, out: Path) -> None:
    draw_heads(console, calibration.heads, calibration.metadata["scores"])
    if calibration.tower is not None:
        draw_heads(console, calibration.tower.heads, "effects, vision tower")
    for each in _measured(calibration):
        shown = f"{each.cost:6.1%} of the visual FLOPs: KL {each.kl:.4f}, right {each.accuracy:.1%}"
        console.print(f"{shown} of {each.samples} held-out samples", highlight=False)
    console.print(f"{calibration.num_samples} samples, written to {out}", soft_wrap=True)


def _measured(calibration: Calibration) -> list[MeasuredPlan]:
    return from_text(calibration.metadata.get(MEASURED, "[]"))
