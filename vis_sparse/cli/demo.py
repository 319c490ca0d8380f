"""`vis-sparse demo`: a shipped tiny model on held-out images, dense and under plans."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..eval.tiny import DEEP, NAMES
from .checks import output_folder
from .options import JsonOption, emit

Family = Enum("Family", {name: name for name in (*NAMES, DEEP)}, type=str)


def demo_command(
    questions: Annotated[int, typer.Option(min=4, help="Held-out questions, over the kinds it knows.")] = 300,
    family: Annotated[Family, typer.Option(help="Which tiny model.")] = Family.llava,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What calibrate wrote for the model.", show_default="the shipped one"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the page.", callback=output_folder)] = Path(
        "out/demo"
    ),
    json_file: JsonOption = None,
) -> None:
    """Show what plans do to a small trained model: accuracy, FLOPs, KV cache and time, a picture and a page.

    Needs the packages of the extra `demo` and no network.
    """
    try:
        from ..eval.demo import run_demo
        from ..eval.page import page
        from ..eval.picture import picture
    except ModuleNotFoundError as error:
        typer.echo(f"vis-sparse: demo: {error.name} is missing, expected pip install 'vis_sparse[demo]'", err=True)
        raise typer.Exit(2) from None
    from transformers.utils.logging import disable_progress_bar

    from ..eval.progress import progress
    from ..eval.tables import draw_demo

    disable_progress_bar()  # of loading weights, over in a moment
    with progress("answering and timing") as on_step:
        results = run_demo(questions, family.value, on_step, calibration)
    out.mkdir(parents=True, exist_ok=True)
    picture(results, out / "demo.png")
    (out / "demo.html").write_text(page(results), encoding="utf-8")

    def draw(console):
        draw_demo(console, results)
        console.print(f"picture: {out / 'demo.png'}\npage:    {out / 'demo.html'}", highlight=False, soft_wrap=True)

    emit(results, json_file, draw)
