"""Calibration data as files hold it: questions about images, perhaps with answers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class SampleError(ValueError):
    """Calibration data that is missing, malformed, or of no use to a calibration."""


@dataclass(frozen=True)
class Record:
    """One question about one image. image: a PIL image or a path. answer: None if there is none."""

    image: object
    question: str
    answer: str | None = None


def read_records(path: str | Path, prompt: str | None = None) -> Iterator[Record]:
    """The records of a JSONL or parquet file with `image`, `question` and perhaps `answer`, or of an image folder.

    In a file, image is a path (relative to the file's folder) or, in parquet, a mapping with `bytes` or `path`.
    prompt: the question put to every image of a folder. Images of a folder come in the order of their names. Raises
    SampleError naming the line or the file.
    """
    path = Path(path)
    if path.is_dir():
        if prompt is None:
            raise SampleError(f"prompt: got none for the image folder {path}, expected the question to ask")
        names = sorted(name for name in path.rglob("*") if name.suffix.lower() in _IMAGES)
        if not names:
            raise SampleError(f"data: got {path} without images, expected at least one")
        return (Record(name, prompt) for name in names)
    if not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
        raise SampleError(f"data: got {str(path)!r}, expected an image folder or a .jsonl or .parquet file")
    rows = _json_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)
    return (_record(row, f"{path}, row {index}", path.parent) for index, row in enumerate(rows, 1))


def _json_rows(path: Path) -> Iterator[object]:
    with path.open() as lines:
        for index, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise SampleError(f"{path}, row {index}: expected a JSON object ({error})") from None


def _parquet_rows(path: Path) -> Iterator[object]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SampleError(f"data: reading {path} needs pyarrow (pip install pyarrow)") from None
    for batch in ParquetFile(path).iter_batches(64):
        yield from batch.to_pylist()


def _record(row, where: str, folder: Path) -> Record:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or "image" not in row:
        raise SampleError(f"{where}: expected image and question (and perhaps answer)")
    image = row["image"]
    if isinstance(image, dict):
        image = _encoded_image(image["bytes"]) if image.get("bytes") else image.get("path")
    if isinstance(image, str):
        image = folder / image
        if not image.is_file():
            raise SampleError(f"{where}: image: got {str(image)!r}, expected an existing file")
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise SampleError(f"{where}: answer: got {answer!r}, expected a string")
    return Record(image, row["question"], answer)


def _encoded_image(data: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(data))
