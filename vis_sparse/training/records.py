"""What a training tells while it runs: lines of JSON in a file, and steps to whoever asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from ..plans.atomic_write import replaced, written


class StepLog(TrainerCallback):
    """One line for each log of the Trainer: step, seconds of training (of all runs together), and its numbers.

    A run that goes on from a checkpoint keeps the lines up to it.
    """

    def __init__(self, file: Path, on_step: Callable[[int, int], None] = lambda done, total: None):
        self.file, self._on_step, self._before, self._start = written(file), on_step, 0.0, time.monotonic()

    def go_on_from(self, step: int) -> None:
        """Forget lines after `step`; 0: all."""
        kept = [line for line in read_log(self.file) if line["step"] <= step] if step and self.file.is_file() else []
        self._before = kept[-1]["seconds"] if kept else 0.0
        with replaced(self.file) as new:
            new.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, step: int, **numbers) -> None:
        facts = {"step": step, "seconds": round(self._before + time.monotonic() - self._start, 1), **numbers}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
            self.add(state.global_step, **numbers)

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._on_step(state.global_step, state.max_steps)


def read_log(file: Path) -> list[dict]:
    """The lines of a log; one that an interruption cut off is none."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
