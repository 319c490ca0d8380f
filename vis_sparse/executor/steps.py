"""Decode steps: calls of one text column a sample, whose tables lie on the device and are never looked at.

A step's slot and column follow from those before it, so tables have room: they already hold the columns to come, which
a slice hides (`Steps`) or causality (`FixedSteps`). What is padding is asked of the call's mask, on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..kernels.patterns import StepPattern
from ..layout.layout import VisualLayout
from ..layout.packing import Coordinates, on_device


class _Tables:
    """Tables of the steps that follow the slots of a book, with room for columns up to `end`.

    slots: coordinates of (batch, slots). length: columns of the sequence so far. Pairs are of the `seen` stores and of
    the `rest` stores: `columns` and `valid` (batch, or 1 if all samples hold the same, slots), `taken` slots in use.
    """

    def __init__(self, slots: Coordinates, length: int, device: torch.device, end: int):
        self.batch, self.length, self.device = len(slots.sample), length, device
        visual = slots.is_visual.any(0)
        self.taken = [len(visual), int((~visual).sum())]
        self.is_whole = bool(slots.valid.all())
        self.is_shared = bool((slots.valid == slots.valid[:1]).all() and (slots.column == slots.column[:1]).all())
        rows = slots.take(np.s_[: 1 if self.is_shared else None])
        column = np.where(rows.valid, rows.column, 0)
        self.columns, self.valid = (
            [on_device(table, device), on_device(table[:, ~visual], device)] for table in (column, rows.valid)
        )
        self.is_visual = on_device(visual, device)
        self._hidden: dict[tuple[bool, ...], torch.Tensor] = {}
        self.end = length
        self.make_room(end)

    def make_room(self, end: int) -> None:
        ahead = torch.arange(self.end, end, device=self.device)
        self.end = end
        rows = [ahead.expand(len(table), -1) for table in self.columns]
        self.columns = [torch.cat(pair, 1) for pair in zip(self.columns, rows)]
        real = [torch.ones_like(more, dtype=torch.bool) for more in rows]
        self.valid = [torch.cat(pair, 1) for pair in zip(self.valid, real)]
        self.is_visual = torch.cat([self.is_visual, torch.zeros_like(ahead, dtype=torch.bool)])
        self._hidden.clear()

    def hidden(self, blind: tuple[bool, ...]) -> torch.Tensor:
        """(1, heads, 1, slots with room) bool: the slots that blind heads must not read."""
        if blind not in self._hidden:
            heads = on_device(np.array(blind), self.device)
            self._hidden[blind] = (heads[:, None] & self.is_visual)[None, :, None]
        return self._hidden[blind]


class Steps(_Tables):
    """Tables of steps whose number the host knows."""

    def __init__(self, slots: Coordinates, length: int, device: torch.device):
        super().__init__(slots, length, device, _with_room(length))

    def next(self, mask: torch.Tensor | None) -> Step:
        """The next step. mask: (batch, columns with the step's own) on the device, False or 0 = padding."""
        past, self.length = self.length, self.length + 1
        if self.length > self.end:
            self.make_room(_with_room(self.length))
        self.taken = [taken + 1 for taken in self.taken]
        if mask is not None and self.is_whole and _is_on_host(mask) and bool(mask.numpy().all()):
            mask = None  # on a CPU a look costs less than the tables
        allowed: list[torch.Tensor | None] = [None, None]
        if mask is not None:
            mask = mask.bool()
            used = [table[:, :taken] for table, taken in zip(self.columns, self.taken)]
            allowed = [mask.gather(1, columns.expand(self.batch, -1)) for columns in used]
        if not self.is_whole:
            valid = [table[:, :taken] for table, taken in zip(self.valid, self.taken)]
            allowed = [own if read is None else own & read for own, read in zip(valid, allowed)]
        return Step(self, self.taken, allowed, mask is None, StepPacking(VisualLayout(self.batch), past, self.batch))

    def select(self, samples: torch.Tensor) -> None:
        """Keep the given samples, in that order."""
        self.batch = len(samples)
        if not self.is_shared:
            samples = samples.to(self.device)
            self.columns, self.valid = (
                [table.index_select(0, samples) for table in tables] for tables in (self.columns, self.valid)
            )


class FixedSteps(_Tables):
    """Tables of steps whose number only the device knows: every step has the same shapes and runs the same operations.

    capacity: columns there is room for. column, at: int64, the next step's column (a number), and its slots in the
    stores, (1,) each.
    """

    def __init__(self, slots: Coordinates, length: int, device: torch.device, capacity: int):
        super().__init__(slots, length, device, capacity)
        self.capacity = capacity
        with torch.inference_mode(False):
            self.column = torch.tensor(length, device=device)
            self.at = [torch.tensor([taken], device=device) for taken in self.taken]

    def next(self, mask: torch.Tensor | None) -> Step:
        """The next step. mask: (batch, columns, the step's own among them) on the device, False or 0 = padding."""
        allowed = [columns <= self.column for columns in self.columns]
        if not self.is_whole:
            allowed = [read & own for read, own in zip(allowed, self.valid)]
        if mask is not None:
            last = mask.shape[1] - 1
            mask = mask.bool()
            allowed = [
                read & mask.gather(1, columns.clamp(max=last).expand(self.batch, -1))
                for read, columns in zip(allowed, self.columns)
            ]
        slots = [table.shape[1] for table in self.columns]
        return Step(self, slots, allowed, mask is None)

    def advance(self) -> None:
        """Go on to the step behind the one that ran."""
        for number in (self.column, *self.at):
            number.add_(1)

    def select(self, samples: torch.Tensor) -> None:
        """Keep as many samples, in the given order."""
        if not self.is_shared:
            for table in (*self.columns, *self.valid):
                table.copy_(table.index_select(0, samples))


def _with_room(length: int) -> int:
    return length + 16 + length // 4


def _is_on_host(mask: torch.Tensor) -> bool:
    return type(mask) is torch.Tensor and mask.device.type == "cpu" and not torch.compiler.is_compiling()


class StepPacking(NamedTuple):
    """What a step tells of itself, as a `Packing` does."""

    layout: VisualLayout
    past: int
    batch: int
    length: int = 1

    @property
    def num_text(self) -> int:
        return self.batch


class Step:
    """The tables of one step, as layers ask a `Call` for them."""

    order = None
    has_run = True

    def __init__(self, tables: _Tables, slots: list[int], allowed: list, is_unmasked: bool, packing=None):
        self.batch = self.num_text = tables.batch
        self.is_unmasked, self.packing = is_unmasked, packing
        self.following: Step | None = None  # the same step's tables behind layers after which tokens left
        self._tables, self._slots, self._allowed = tables, slots, allowed
        self._patterns: dict = {}

    def split(self, hidden, cos, sin):
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        # the lanes write into their rows
        return hidden[:, 0].clone(), cos.expand(self.batch, -1, -1), sin.expand(self.batch, -1, -1)

    def merge(self, hidden, x, stopped=None):
        return x[:, None]

    def by_sample(self, text):
        return text[:, None]

    def text_pattern(self, seen: bool, blind: tuple[bool, ...] | None = None) -> StepPattern:
        if (seen, blind) not in self._patterns:
            place = 0 if seen else 1
            hidden = None if blind is None else self._tables.hidden(blind)[..., : self._slots[place]]
            self._patterns[seen, blind] = StepPattern(self._allowed[place], hidden)
        return self._patterns[seen, blind]
