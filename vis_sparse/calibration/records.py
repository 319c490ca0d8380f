"""Calibration data as files hold it: questions about images, perhaps with answers."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..plans.atomic_write import is_file
from ..plans.layer_plan import brief, reason

_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


# What the decoders of Pillow raise for bytes that are no image.
_UNREADABLE = (
    OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, KeyError, MemoryError, OverflowError,
    ZeroDivisionError, AttributeError, RuntimeError, struct.error,
)  # fmt: skip


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
    if _is_folder(path):
        if prompt is None:
            raise SampleError(f"prompt: got none for the image folder {path}, expected the question to ask")
        names = sorted(name for name in path.rglob("*") if name.suffix.lower() in _IMAGES)
        if not names:
            raise SampleError(f"data: got {path} without images, expected at least one")
        return (Record(name, prompt) for name in names)
    if not is_file(path) or path.suffix not in (".jsonl", ".parquet"):
        raise SampleError(f"data: got {str(path)!r}, expected an image folder or a .jsonl or .parquet file")
    rows = _json_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)
    return (_record(row, f"{path}, row {index}", path.parent) for index, row in enumerate(rows, 1))


def _json_rows(path: Path) -> Iterator[object]:
    with path.open("rb") as lines:
        for index, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SampleError(f"{path}, row {index}: expected a JSON object ({error})") from None


def _parquet_rows(path: Path) -> Iterator[object]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SampleError(f"data: reading {path} needs pyarrow (pip install pyarrow)") from None
    try:
        for batch in ParquetFile(path).iter_batches(64):
            yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise SampleError(f"data: {path}: expected a parquet file ({reason(error)})") from None


def _record(row, where: str, folder: Path) -> Record:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or "image" not in row:
        raise SampleError(f"{where}: expected image and question (and perhaps answer)")
    image = row["image"]
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        image = decoded(io.BytesIO(image), where)
    elif not isinstance(image, str):
        raise SampleError(f"{where}: image: got {brief(image)}, expected a path, or a mapping with bytes or path")
    elif not is_file(folder / image):
        raise SampleError(f"{where}: image: got {brief(str(folder / image))}, expected an existing file")
    else:
        image = folder / image
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise SampleError(f"{where}: answer: got {brief(answer)}, expected a string")
    return Record(image, row["question"], answer)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # names that nothing can have
        return False


@contextmanager
def whole_images() -> Iterator[None]:
    """Within the block, truncated images are errors: lmms-eval lets Pillow fill up what is missing, everywhere."""
    from PIL import ImageFile

    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decoded(file: Path | io.BytesIO, where: str):
    """The RGB image in a file. Raises SampleError, that says where, if it is none or a broken one."""
    from PIL import Image

    try:
        with whole_images(), Image.open(file) as image:
            found = image.convert("RGB")
        if 0 in found.size:
            raise ValueError(f"{found.width}x{found.height} pixels")
        return found
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise SampleError(f"{where}: image: expected an image ({reason(error)})") from None
