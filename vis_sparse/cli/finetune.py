"""`vis-sparse finetune`: train a model under a plan on LLaVA's conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..eval.progress import progress
from ..eval.tables import tight_table
from .calibrate import CheckpointOption, DeviceOption
from .checks import count, output_folder
from .options import JsonOption, emit, scores_beside


def finetune_command(
    model: CheckpointOption,
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="LLaVA's conversations: .json or .jsonl, rows of image, conversations.")
    ],
    plan: Annotated[
        str, typer.Option("--plan", metavar="P", help="A shipped plan, a YAML file, a folder or a Hub id with a plan.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Checkpoint or adapter, and log.jsonl.", callback=output_folder)
    ],
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of the images.", show_default="the data's")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out conversations, to evaluate on along the way.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="From calibrate, for head and neuron budgets.", show_default="a shipped model's own"
        ),
    ] = None,
    lora: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Rank of adapters.", show_default="the decoder trains whole")
    ] = None,
    distill: Annotated[
        float, typer.Option(min=0, max=1, help="Weight of KL to the dense model's answers beside the labels' loss.")
    ] = 0.0,
    top: Annotated[
        int, typer.Option(min=1, help="Of its likeliest tokens kept on disk for that.", callback=count)
    ] = 32,
    projector: Annotated[bool, typer.Option(help="Train what is between tower and decoder too.")] = True,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps instead of epochs.", callback=count, show_default="epochs")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a process at once.", callback=count)] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step.", callback=count)] = 1,
    rate: Annotated[float | None, typer.Option(help="Learning rate.", show_default="2e-5, adapters 2e-4")] = None,
    optimizer: Annotated[str, typer.Option(help="One of transformers' Trainer: adamw_torch, adafactor, ...")] = (
        "adamw_torch"
    ),
    most_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut sequences off there.", callback=count, show_default="never")
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute activations twice.")] = False,
    autocast: Annotated[
        str | None, typer.Option(help="bfloat16 or float16 products.", show_default="those of --dtype")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.", callback=count)] = 500,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.", callback=count)] = 500,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of the log.", callback=count)] = 10,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare batches.", callback=count)] = 0,
    seed: Annotated[int, typer.Option(help="Of the order of the data.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Train a model under a plan: it computes in training what it will compute afterwards.

    The checkpoint, or the adapter with --lora, carries the plan: `vis_sparse.from_pretrained(FOLDER)` loads and patches
    it. `accelerate launch -m vis_sparse finetune ...` trains in several processes. Needs the packages of the extra
    `train`.
    """
    try:
        import accelerate  # noqa: F401, which the Trainer needs
    except ModuleNotFoundError:
        typer.echo("vis-sparse: finetune: accelerate is missing, expected pip install 'vis_sparse[train]'", err=True)
        raise typer.Exit(2) from None
    from ..training.finetune import finetune
    from ..training.settings import Settings
    from .launch import join
    from .model import load_model

    settings = Settings(
        steps=steps,
        epochs=epochs,
        batch=batch,
        accumulate=accumulate,
        rate=rate,
        optimizer=optimizer,
        lora=lora,
        projector=projector,
        autocast=autocast,
        checkpointing=checkpointing,
        distill=distill,
        top=top,
        most_tokens=most_tokens,
        save=save_every,
        evaluate=eval_every,
        log=log_every,
        workers=workers,
        seed=seed,
    )
    device, reports = join(device)
    loaded, processor = load_model(model, dtype, device)
    with progress("training") as on_step, progress("asking the dense model") as on_teacher:
        done = finetune(
            loaded,
            processor,
            data,
            plan,
            out=out,
            settings=settings,
            images=images,
            held_out=eval_data,
            calibration=calibration or scores_beside(model),
            resume=resume,
            on_step=on_step,
            on_teacher=on_teacher,
        )
    if reports:
        emit(done, json_file, lambda console: _draw(console, done))


def _draw(console: Console, done: dict) -> None:
    table = tight_table("step", "loss", "held out: loss", "answers right", "tokens right")
    for line in done["log"]:
        prefix = "dense" if "dense_loss" in line else "eval"
        if f"{prefix}_loss" in line:
            right = (f"{line[f'{prefix}_{name}']:.1%}" for name in ("answers_right", "tokens_right"))
            step = "dense" if prefix == "dense" else str(line["step"])
            table.add_row(step, "", f"{line[f'{prefix}_loss']:.4f}", *right)
        elif "loss" in line:
            table.add_row(str(line["step"]), f"{line['loss']:.4f}", "", "", "")
    console.print(table)
    console.print(
        f"{done['trained_parameters']:,} of {done['parameters']:,} parameters, {done['steps']} steps under "
        f"{done['plan']}, written to {done['out']}",
        soft_wrap=True,
        highlight=False,
    )
