"""Files: whether they are there, and writing them whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def written(path: str | Path) -> Path:
    """The path of a file to write, the folders on the way there made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path to write to; at the end of the block it becomes `path`, at once: an interruption leaves the old file.

    Folders on the way there are made: what took an hour to measure is not lost for the lack of one. Who may read the
    file is as for any new file (the umask), whatever writes it: safetensors lets nobody but its owner.
    """
    path = written(path)
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)  # an interruption's
    new.touch()
    mode = new.stat().st_mode
    yield new
    new.chmod(mode)
    os.replace(new, path)


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; not for names that no file can have either."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
