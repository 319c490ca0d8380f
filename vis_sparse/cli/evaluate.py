"""`vis-sparse eval`: lmms-eval under several plans, accuracy beside FLOPs, KV cache and time."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..eval.bench import DTYPES
from ..eval.tiny import SHIPPED
from .checks import one_of, output_folder, torch_device
from .options import JsonOption, emit, scores_beside, shipped


def eval_command(
    model: Annotated[
        str, typer.Option("--model", metavar="M", help=f"A checkpoint or its name; {', '.join(SHIPPED)}: shipped.")
    ] = "tiny/llava",
    plan: Annotated[str, typer.Option("--plan", metavar="A,B,...", help="Plans, names or files.")] = "dense,auto",
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="T,...", help="Of lmms-eval, or easy_vqa, digit_grid, digit_grid_turns.")
    ] = "easy_vqa,digit_grid",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples of each task.", show_default="all there are")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once, where lmms-eval's model takes several.")] = 1,
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Results; run again, what is done is kept.", callback=output_folder),
    ] = Path("out/eval"),
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="From vis-sparse calibrate, for head and neuron budgets.")
    ] = None,
    timed: Annotated[
        int, typer.Option(min=0, help="Samples of each task timed under the plan and unpatched, in turns.")
    ] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    base: Annotated[
        str | None, typer.Option(help="lmms-eval's model to patch.", show_default="by the checkpoint's model_type")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Score plans on tasks of lmms-eval. Writes a table (Markdown, CSV, JSON) and a picture. Stopped and started again,
    it goes on. Needs the packages of the extra `eval`."""
    plans, names = _listed(plan, "--plan"), _listed(tasks, "--tasks")
    one_of(dtype, DTYPES, "--dtype")
    torch_device(device)
    # lmms-eval and what it imports print to stdout, which is for the result
    with contextlib.redirect_stdout(sys.stderr):
        try:
            from ..eval.lmms.run import Settings, evaluate
            from ..eval.lmms.tables import draw_table, pareto, write_tables
        except ModuleNotFoundError as error:
            typer.echo(f"vis-sparse: eval: {error.name} is missing, expected pip install 'vis_sparse[eval]'", err=True)
            raise typer.Exit(2) from None
        from datasets import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of loading weights; lmms-eval shows its own for the samples
        disable_progress_bars()  # of writing and reading the questions
        done, total = 0, len(plans) * len(names)

        def on_pair(task: str, name: str, is_known: bool) -> None:
            nonlocal done
            done += 1
            note = f" (from {out})" if is_known else ""
            typer.echo(f"[{done}/{total}] {name} on {task}{note}", err=True)

        if model in SHIPPED:
            folder = shipped(model)
            model, calibration = str(folder), calibration or scores_beside(folder)
            # lmms-eval's class for Qwen2-VL resizes images to multiples of 28 pixels
            base = base or "llava_hf"
        settings = Settings(
            model,
            limit,
            batch_size,
            timed,
            None if calibration is None else str(calibration),
            dtype=dtype,
            device=device,
            base=base,
        )
        rows = evaluate(settings, plans, names, out, on_pair)
        write_tables(rows, out)
        pareto(rows, out / "pareto.png")

    def draw(console) -> None:
        draw_table(console, rows)
        files = ", ".join(str(out / name) for name in ("results.md", "results.csv", "results.json", "pareto.png"))
        console.print(f"written: {files}", highlight=False, soft_wrap=True)

    emit(rows, json_file, draw)


def _listed(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(f"got {text!r}, expected one name or several with commas between", param_hint=option)
    return names
