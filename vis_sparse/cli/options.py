"""What the commands have in common: options, the `--json` convention, and how numbers are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..cost.shape_lookup import shape_names
from ..eval.tiny import SHIPPED, checkpoint
from ..layout.image_grids import ShapeError
from ..plans.atomic_write import written
from .checks import output_file


def folder_of(model: str) -> str:
    """The folder of a shipped model by its name ("tiny/llava"); any other name as it is, which may be one of the Hub
    (NAME or OWNER/NAME). Raises ShapeError for what can only be a folder and is none."""
    is_path = Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if is_path and not Path(model).is_dir():
        raise ShapeError(
            f"model: got {model!r}, no such folder; expected a checkpoint's, or a shipped name: {', '.join(SHIPPED)}, "
            f"or where only the sizes count {', '.join(shape_names())}"
        )
    return str(shipped(model)) if model in SHIPPED else model


def shipped(model: str) -> Path:
    """The folder of a shipped model by its name. Raises ShapeError with what to install for one that needs more."""
    try:
        return checkpoint(SHIPPED[model])
    except ModuleNotFoundError as error:
        raise ShapeError(str(error)) from None


def scores_beside(model: str | Path) -> Path | None:
    """The head scores that a checkpoint's folder has, as the shipped ones' do."""
    file = Path(model) / "heads.safetensors"
    return file if file.is_file() else None


JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - = stdout.", callback=output_file),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        help="A shipped model shape or small model (tiny/llava, ...), or a folder with a config.json.",
        callback=folder_of,
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="What calibrate wrote: which heads and neurons budgets keep.",
        show_default="the first ones",
    ),
]
ConventionOption = Annotated[
    str, typer.Option("--convention", help="executed (text included), paper, macs or fastv (visual tokens only).")
]


def emit(data, json_file: str | None, draw: Callable[[Console], None]) -> None:
    """Give a command's result back: `data` as JSON if a file was asked for, and drawn unless JSON has stdout."""
    if json_file is not None:
        text = json.dumps(data, indent=2) + "\n"
        if json_file == "-":
            sys.stdout.write(text)
            return
        written(Path(json_file)).write_text(text)
    draw(Console())


def bar(share: float, width: int = 10, style: str = "cyan") -> Text:
    """A bar of `width` cells, `share` of it filled; anything above 0 shows at least an eighth of a cell."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    filled = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return Text(filled, style=style) + Text("·" * (width - len(filled)), style="bright_black")
