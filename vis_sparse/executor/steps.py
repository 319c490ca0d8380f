"""Decode steps: calls of one text column a sample, whose tables lie on the device and are never looked at.

A step's slot and column follow from those before it, so tables have room: they already hold the columns to come, which
a slice hides (`Steps`) or causality (`FixedSteps`). What is padding is asked of the call's mask, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..kernels.patterns import BlindHeads, StepBlindHeads, StepMask, StepPattern
from ..layout.layout import VisualLayout
from ..layout.packing import Coordinates, on_device


class Steps:
    """Tables of steps whose number the host knows: those that follow the slots of a book, with room for more columns.

    slots: coordinates of (batch, slots). length: columns of the sequence so far. Pairs are of the `seen` stores and of
    the `rest` stores: `columns` and `valid` (batch, or 1 if all samples hold the same, slots), `taken` slots in use.
    """

    def __init__(self, slots: Coordinates, length: int, device: torch.device):
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
        self._blind: dict[tuple[bool, ...], BlindHeads] = {}
        self.end = length
        self._make_room(_with_room(length))

    @torch.inference_mode(False)  # they outlive the call
    def _make_room(self, end: int) -> None:
        ahead = torch.arange(self.end, end, device=self.device)
        self.end = end
        rows = [ahead.expand(len(table), -1) for table in self.columns]
        self.columns = [torch.cat(pair, 1) for pair in zip(self.columns, rows)]
        real = [torch.ones_like(more, dtype=torch.bool) for more in rows]
        self.valid = [torch.cat(pair, 1) for pair in zip(self.valid, real)]
        self.is_visual = torch.cat([self.is_visual, torch.zeros_like(ahead, dtype=torch.bool)])
        self._blind.clear()

    def next(self, mask: torch.Tensor | None) -> Step:
        """The next step. mask: (batch, columns with the step's own) bool on the device, False = padding."""
        past, self.length = self.length, self.length + 1
        if self.length > self.end:
            self._make_room(_with_room(self.length))
        self.taken = [taken + 1 for taken in self.taken]
        return Step(self, self.taken, mask, StepPacking(VisualLayout(self.batch), past, self.batch))

    def allowed(self, place: int, taken: int, mask: torch.Tensor | None) -> torch.Tensor | None:
        """(batch or 1, taken) bool: the slots of a place that a step reads; None if all."""
        valid = None if self.is_whole else self.valid[place][:, :taken]
        if mask is None:
            return valid
        read = mask.gather(1, self.columns[place][:, :taken].expand(self.batch, -1))
        return read if valid is None else read & valid

    def blind(self, heads: tuple[bool, ...]) -> BlindHeads:
        if heads not in self._blind:
            self._blind[heads] = BlindHeads(on_device(np.array(heads), self.device), self.is_visual)
        return self._blind[heads]

    def last(self, place: int) -> None:
        """Every slot that a step is given is in use."""

    def select(self, samples: torch.Tensor) -> None:
        """Keep the given samples, in that order."""
        self.batch = len(samples)
        if not self.is_shared:
            samples = samples.to(self.device)
            self.columns, self.valid = (
                [table.index_select(0, samples) for table in tables] for tables in (self.columns, self.valid)
            )


class FixedSteps:
    """Tables of steps whose number only the device knows: every step has the same shapes and runs the same operations.

    Pairs are of the `seen` stores and of the `rest` stores. columns, valid: (batch, width of the store). at: (1,)
    int64, the next step's slot. is_visual: (width of the `seen` stores,). column: int64, the next step's column.
    capacity: columns there is room for.
    """

    def __init__(self, batch: int, widths: Sequence[int], capacity: int, device: torch.device):
        self.batch, self.capacity, self.device = batch, capacity, device
        with torch.inference_mode(False):  # they outlive the call
            self.columns = [torch.zeros(batch, width, dtype=torch.long, device=device) for width in widths]
            self.valid = [torch.zeros(batch, width, dtype=torch.bool, device=device) for width in widths]
            self.is_visual = torch.zeros(widths[0], dtype=torch.bool, device=device)
            self.column = torch.zeros((), dtype=torch.long, device=device)
            self.at = [torch.zeros(1, dtype=torch.long, device=device) for _ in widths]
        self._heads: dict[tuple[bool, ...], torch.Tensor] = {}

    @classmethod
    def after(cls, slots: Coordinates, length: int, capacity: int, device: torch.device) -> FixedSteps:
        """Steps that follow the slots of a book, (batch, slots), up to `capacity` columns."""
        room = capacity - length
        visual = slots.is_visual.any(0)
        fixed = cls(len(slots.sample), (len(visual) + room, int((~visual).sum()) + room), capacity, device)
        fixed.load(slots, length)
        return fixed

    def load(self, slots: Coordinates, length: int) -> None:
        """Go on behind the slots of a book, (batch, slots), which hold `length` columns."""
        visual = slots.is_visual.any(0)
        self.is_visual.zero_()
        self.is_visual[: len(visual)] = on_device(visual, self.device)
        for place, own in enumerate((slots, slots.take(np.s_[:, ~visual]))):
            taken, width = own.column.shape[1], self.columns[place].shape[1]
            ahead = np.broadcast_to(length + np.arange(width - taken), (self.batch, width - taken))
            columns = np.concatenate([np.where(own.valid, own.column, 0), ahead], 1)
            valid = np.concatenate([own.valid, np.ones(ahead.shape, dtype=bool)], 1)
            self.columns[place].copy_(on_device(columns, self.device))
            self.valid[place].copy_(on_device(valid, self.device))
            self.at[place].fill_(taken)
        self.column.fill_(length)

    def next(self, mask: torch.Tensor | None) -> Step:
        """The next step. mask: (batch, columns, the step's own among them) bool on the device, False = padding."""
        return Step(self, [table.shape[1] for table in self.columns], mask)

    def allowed(self, place: int, taken: int, mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, width) bool: the slots of a place that the step reads."""
        columns = self.columns[place]
        read = (columns <= self.column) & self.valid[place]
        return read if mask is None else read & mask.gather(1, columns.clamp(max=mask.shape[1] - 1))

    def blind(self, heads: tuple[bool, ...]) -> BlindHeads:
        if torch.compiler.is_compiling():  # what a traced call leaves behind would have it traced again
            return StepBlindHeads(torch.tensor(heads, device=self.device), self.is_visual)
        if heads not in self._heads:
            self._heads[heads] = on_device(np.array(heads), self.device)
        return StepBlindHeads(self._heads[heads], self.is_visual)

    def last(self, place: int) -> torch.Tensor:
        """(1,) the last slot in use."""
        return self.at[place]

    def advance(self) -> None:
        """Go on to the step behind the one that ran."""
        for number in (self.column, *self.at):
            number.add_(1)

    def select(self, samples: torch.Tensor) -> None:
        """Keep as many samples, in the given order."""
        for table in (*self.columns, *self.valid):
            table.copy_(table.index_select(0, samples))


def _with_room(length: int) -> int:
    return length + 16 + length // 4


def mask_of_step(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A step's mask on the device, bool; None if nothing is padding, as far as that can be told for nothing."""
    if mask is None or type(mask) is torch.Tensor and mask.device.type == "cpu" and bool(mask.numpy().all()):
        return None  # on a CPU a look costs less than the tables
    return mask.to(device).bool()


class StepPacking(NamedTuple):
    """What a step tells of itself, as a `Packing` does."""

    layout: VisualLayout
    past: int
    batch: int
    length: int = 1
    longest_text: int = 1
    num_visual: int = 0

    @property
    def num_text(self) -> int:
        return self.batch


class Step:
    """The tables of one step, as layers ask a `Call` for them."""

    order = None
    has_run = is_step = True

    def __init__(self, tables: Steps | FixedSteps, slots: list[int], mask: torch.Tensor | None, packing=None):
        self.batch = self.num_text = tables.batch
        self.packing = packing
        self.following: Step | None = None  # the same step's tables behind layers after which tokens left
        self._tables, self._slots, self._mask = tables, slots, mask
        self._patterns: dict = {}
        self._places: dict = {}
        self._read: dict[int, StepMask | None] = {}

    def split(self, hidden, cos, sin):
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        # the lanes write into their rows
        return hidden[:, 0].clone(), cos.expand(self.batch, -1, -1), sin.expand(self.batch, -1, -1)

    def merge(self, hidden, x, stopped=None):
        return x[:, None]

    def by_sample(self, text):
        return text[:, None]

    def has_room(self, stores) -> bool:
        """Whether a slot more can be written into the stores where they lie; makes room."""
        return all([store.has_room() for store in stores if store.buffer is not None])

    def places(self, place: int, store) -> torch.Tensor:
        """(batch,) int32: the step's slot of each sample in a store whose samples lie one after the other."""
        room = store.buffer.shape[1]
        if (place, room) not in self._places:
            first = torch.arange(0, self.batch * room, room, dtype=torch.int32, device=store.buffer.device)
            self._places[place, room] = first + store.next
        return self._places[place, room]

    def text_pattern(self, seen: bool, blind: tuple[bool, ...] | None = None) -> StepPattern:
        if (seen, blind) not in self._patterns:
            place = 0 if seen else 1
            slots, tables = self._slots[place], self._tables
            if place not in self._read:
                allowed = tables.allowed(place, slots, self._mask)
                self._read[place] = None if allowed is None else StepMask(allowed[:, None, None])
            hidden = None if blind is None else tables.blind(blind)
            self._patterns[seen, blind] = StepPattern(slots, self._read[place], hidden, tables.last(place))
        return self._patterns[seen, blind]
