"""A file of what was measured, written as it is measured, so that a search that is stopped at any time goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..calibration.records import SampleError
from ..plans.atomic_write import replaced


class Log:
    """Measurements (lists of numbers) by key; what is known already is not measured again.

    file: JSON lines, None to keep nothing. facts: what must be equal for a file to be of use (text to text).
    """

    def __init__(self, file: str | Path | None = None, facts: dict[str, str] | None = None):
        self._known, self._file = {}, None
        if file is None:
            return
        file = Path(file)
        if file.is_file():
            self._known = _read(file, facts or {})
        # anew and at once: an interruption may have left half a line
        with replaced(file) as new:
            new.write_text(json.dumps(facts) + "\n" + "".join(_line(*entry) for entry in self._known.items()))
        self._file = file.open("a")

    def __call__(self, key: str, measure: Callable[[], list[float]]) -> list[float]:
        """What is known under `key`, or else what `measure` gives."""
        if key not in self._known:
            self._known[key] = measure()
            if self._file is not None:
                self._file.write(_line(key, self._known[key]))
                self._file.flush()
        return self._known[key]


def _line(key: str, values: list[float]) -> str:
    return json.dumps([key, values]) + "\n"


def _read(file: Path, facts: dict[str, str]) -> dict[str, list[float]]:
    first, *lines = file.read_text().split("\n")
    try:
        before = json.loads(first)
        changed = sorted(name for name, value in facts.items() if before.get(name) != value)
        # the last piece is empty, or a line that was not finished
        known = dict(map(json.loads, lines[:-1]))
    except (ValueError, AttributeError) as error:
        raise SampleError(f"log: {file}: expected a file that a search wrote ({error})") from None
    if changed:
        raise SampleError(
            f"log: {file} is of a search with another {', '.join(changed)}, expected the same one "
            "(remove the file to start again)"
        )
    return known
