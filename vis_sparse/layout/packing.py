"""Packing: the index tables of one call, from the layout of its visual tokens, its padding and the cached past.

A call's rows are its text rows (batch x text length, padded) followed by its visual rows (packed over the batch).
Its keys are slots: for each sample the cached past, then the call's visual tokens, then its text tokens. Everything
here is numpy on the host and happens once per layout; the device sees finished index tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .layout import LayoutError, VisualLayout

if TYPE_CHECKING:
    import torch


class Coordinates(NamedTuple):
    """Where tokens are. Arrays of one shape: sample, column of the sequence, segment (-1: text), frame, row, column
    in the grid, the grid's height and width, and whether the entry is a real token (not padding)."""

    sample: np.ndarray
    column: np.ndarray
    segment: np.ndarray
    frame: np.ndarray
    y: np.ndarray
    x: np.ndarray
    height: np.ndarray
    width: np.ndarray
    valid: np.ndarray

    def take(self, index) -> Coordinates:
        return Coordinates(*(array[index] for array in self))

    def moved(self, places: np.ndarray) -> Coordinates:
        """With every column replaced by `places`, (batch, columns)."""
        return self._replace(column=places[self.sample, self.column])

    def masked(self, mask: np.ndarray | None) -> Coordinates:
        """Entries where `mask` (batch, columns) is False are padding; None masks nothing."""
        return self if mask is None else self._replace(valid=self.valid & mask[self.sample, self.column])

    @property
    def is_visual(self) -> np.ndarray:
        return self.segment >= 0


def on_device(table: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host table as a tensor. Tables outlive the call, so none may be an inference tensor."""
    import torch  # here alone: counting needs coordinates, and no torch

    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(table)).to(device)


def text_coordinates(sample: np.ndarray, column: np.ndarray, valid: np.ndarray) -> Coordinates:
    zero = np.zeros_like(column)
    return Coordinates(sample, column, zero - 1, zero, zero, zero, zero + 1, zero + 1, valid)


def visual_coordinates(layout: VisualLayout) -> Coordinates:
    """The packed visual rows of `layout`, segment after segment, each in raster order."""
    parts = []
    for index, s in enumerate(layout.segments):
        frame, y, x = (a.ravel() for a in np.indices((s.frames, s.height, s.width)))
        one = np.ones(s.size, dtype=np.int64)
        parts.append(
            (s.sample * one, s.start + np.arange(s.size), index * one, frame, y, x, s.height * one, s.width * one)
        )
    arrays = [np.concatenate(a) for a in zip(*parts)] if parts else [np.zeros(0, dtype=np.int64)] * 8
    return Coordinates(*arrays, np.ones(len(arrays[0]), dtype=bool))


@dataclass(frozen=True)
class Packing:
    """The tables of one call of `length` columns after `past` cached ones.

    text_columns: (batch, text length) local column of each text row, left-padded with 0 where `text_valid` is False.
    visual: coordinates of the packed visual rows. visual_slots: (batch, visual length) packed row of each visual
    slot, left-padded with 0 where `visual_valid` is False.
    """

    batch: int
    length: int
    past: int
    layout: VisualLayout
    text_columns: np.ndarray
    text_valid: np.ndarray
    visual: Coordinates
    visual_slots: np.ndarray
    visual_valid: np.ndarray

    @property
    def num_text(self) -> int:
        """Text rows, padded."""
        return self.text_columns.size

    @property
    def longest_text(self) -> int:
        """Rows of the longest text, without padding."""
        return int(self.text_valid.sum(1).max(initial=0))

    @property
    def num_visual(self) -> int:
        return len(self.visual.sample)

    @property
    def packed_is_padded(self) -> bool:
        """Whether the packed visual rows are already (batch, visual length): no gather is needed."""
        return self.visual_slots.size == self.num_visual

    def row_index(self) -> np.ndarray:
        """Index of every row (text, then visual) in the call's (batch * length) hidden states."""
        text = self.text_columns + np.arange(self.batch)[:, None] * self.length
        return np.concatenate([text.ravel(), self.visual.sample * self.length + self.visual.column - self.past])

    def slots(self) -> Coordinates:
        """Coordinates of the call's own slots, (batch, visual length + text length)."""
        sample = np.broadcast_to(np.arange(self.batch)[:, None], self.text_columns.shape)
        text = text_coordinates(sample, self.text_columns + self.past, self.text_valid)
        if not self.num_visual:
            return text
        visual = self.visual.take(self.visual_slots)._replace(valid=self.visual_valid)
        visual = visual._replace(sample=np.broadcast_to(np.arange(self.batch)[:, None], self.visual_slots.shape))
        return Coordinates(*(np.concatenate([v, t], axis=1) for v, t in zip(visual, text)))

    def layout_without_padding(self) -> VisualLayout:
        """The call's segments, positions counted over the real tokens of the call, those that left among them."""
        whole = self._over(visual_coordinates(self.layout))
        places = places_of(whole.slots(), self.past + self.length)
        moved = (replace(s, start=int(places[s.sample, s.start])) for s in self.layout.segments)
        return VisualLayout(self.batch, tuple(moved))

    def keep(self, kept: np.ndarray) -> Packing:
        """The tables with the packed visual rows `kept`, ascending, and all text rows."""
        return self._over(self.visual.take(kept))

    def _over(self, visual: Coordinates) -> Packing:
        """The tables of other visual rows."""
        slots, valid = _visual_slots(self.batch, visual.sample)
        return replace(self, visual=visual, visual_slots=slots, visual_valid=valid)

    def moved(self, places: np.ndarray) -> Packing:
        """The tables with every column replaced by its place; the past is then a part of the call's columns."""
        sample = np.arange(self.batch)[:, None]
        return replace(
            self,
            length=int(places.max(initial=-1)) + 1,
            past=0,
            text_columns=places[sample, self.text_columns + self.past],
            visual=self.visual.moved(places),
        )


def places_of(slots: Coordinates, columns: int) -> np.ndarray:
    """(batch, columns): each column's place among the real tokens of `slots` in its sample, counted without gaps."""
    present = np.zeros((len(slots.sample), columns), dtype=bool)
    present[slots.sample[slots.valid], slots.column[slots.valid]] = True
    return np.maximum(present.cumsum(1) - 1, 0)


def pack(
    layout: VisualLayout,
    length: int,
    past: int = 0,
    mask: np.ndarray | None = None,
    text_rows: Callable[[int], int] | None = None,
) -> Packing:
    """Tables for a call of `length` columns after `past` ones.

    layout: the call's own segments, positions counted from the start of the sequence. mask: (batch, length) bool of
    the call's columns, False = padding; None = no padding. text_rows: gives how many rows of text each sample gets, at
    least as many as the longest text has; None: as many. Raises LayoutError if a visual token is masked.
    """
    batch = layout.batch_size
    is_text = np.ones((batch, length), dtype=bool) if mask is None else mask.copy()
    visual = visual_coordinates(layout)
    local = visual.column - past
    if mask is not None and not mask[visual.sample, local].all():
        raise LayoutError("attention_mask: got 0 at visual tokens, expected 1 (visual tokens cannot be padding)")
    is_text[visual.sample, local] = False
    text_columns, text_valid = _left_padded(is_text, text_rows)
    visual_slots, visual_valid = _visual_slots(batch, visual.sample)
    return Packing(batch, length, past, layout, text_columns, text_valid, visual, visual_slots, visual_valid)


def _visual_slots(batch: int, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots of packed visual rows of these samples, and which are real."""
    owner = np.zeros((batch, len(sample)), dtype=bool)
    owner[sample, np.arange(len(sample))] = True
    return _left_padded(owner)


def _left_padded(member: np.ndarray, width: Callable[[int], int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The True columns of each row of `member`, right-aligned; and which entries are real. width: of the longest."""
    counts = member.sum(1)
    longest = int(counts.max(initial=0))
    longest = longest if width is None else width(longest)
    index = np.zeros((len(member), longest), dtype=np.int64)
    valid = np.arange(longest)[None, :] >= longest - counts[:, None]
    index[valid] = np.nonzero(member)[1]
    return index, valid
