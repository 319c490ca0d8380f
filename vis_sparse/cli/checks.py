"""Checks of what commands are given, before they work: callbacks of options, and values with a meaning of their own."""

from __future__ import annotations

import os
from pathlib import Path

import typer

_MOST = 1 << 31


def output_file(path):
    """The path of a file to write, in folders that are made on the way, if that is possible; None and - (stdout) as
    they are."""
    if path is None or str(path) == "-":
        return path
    try:
        file = Path(path)
        if file.is_dir() or not file.name or file.exists() and not os.access(file, os.W_OK):
            raise OSError("a folder" if file.is_dir() else "not to be written to")
        _check_folder(file.parent)
        return path
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"got {_short(path)}, expected a file to write ({_short(error)})") from None


def output_folder(path):
    """The path of a folder to write into, there or not, if that is possible; None as it is."""
    if path is None:
        return path
    try:
        _check_folder(Path(path))
        return path
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"got {_short(path)}, expected a folder to write into ({_short(error)})") from None


def _check_folder(folder: Path) -> None:
    """Raise OSError for a folder that is not there and cannot be made, or cannot be written to."""
    if len(max(folder.parts, key=len, default="")) > 255:
        raise OSError("a name that is too long")
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"{there} cannot be written to")


def count(number: int | None) -> int | None:
    """A number of things, of which there cannot be billions."""
    if number is not None and number >= _MOST:
        raise typer.BadParameter(f"got {_short(number)}, expected less than {_MOST}")
    return number


def one_of(value: str, known, option: str) -> str:
    if value not in known:
        raise typer.BadParameter(f"got {_short(value)}, expected one of {', '.join(known)}", param_hint=option)
    return value


def counts(text: str, minimum: int, option: str) -> list[int]:
    """Integers with commas between them."""
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isascii() and piece.isdecimal() and len(piece) < 10 and int(piece) >= minimum for piece in pieces):
        expected = f"expected integers >= {minimum} with commas between them"
        raise typer.BadParameter(f"got {_short(text)}, {expected}", param_hint=option)
    return [int(piece) for piece in pieces]


def torch_device(name: str) -> str:
    """A device on which torch can make a tensor."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        expected = f"expected a device of torch ({_short(str(error).splitlines()[0])})"
        raise typer.BadParameter(f"got {_short(name)}, {expected}", param_hint="--device") from None
    return name


def _short(value) -> str:
    text = str(value) if isinstance(value, Exception) else repr(str(value))
    return text if len(text) <= 100 else f"{text[:100]}..."
