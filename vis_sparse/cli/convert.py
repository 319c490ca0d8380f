"""`vis-sparse convert-internvl2`: original InternVL2 checkpoints for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import JsonOption, emit


def convert_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Folder with the original checkpoint.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    image_token_id: Annotated[
        int | None,
        typer.Option(help="Id of <IMG_CONTEXT>.", show_default="read from the tokenizer files beside the weights"),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Convert an original InternVL2 checkpoint to one that transformers loads, one shard at a time."""
    from ..checkpoints.internvl2 import convert_internvl2

    convert_internvl2(source, output, image_token_id)
    files = sorted(file.name for file in output.iterdir())

    def draw(console: Console) -> None:
        console.print(f"{output}: {', '.join(files)}")

    emit({"output": str(output), "files": files}, json_file, draw)
