"""One call of the executor: its index tables and masks on the device, kept for as long as the layout repeats."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from .kernels import Backend
from .kernels.patterns import TextPattern, VisualPattern
from .packing import Coordinates, Packing, on_device, text_coordinates


class Call:
    """Tables of one call on a device.

    packing: the call's rows. seen, rest: coordinates of the slots of the two stores after the call's own were
    appended, (batch, slots).
    """

    def __init__(self, packing: Packing, seen: Coordinates, rest: Coordinates, device: torch.device):
        self.packing, self.device = packing, device
        self._seen, self._rest = seen, rest
        self._patterns: dict = {}
        self.num_text = packing.num_text
        self.batch = packing.batch
        self.has_run = False  # whether the backend's tables have been built
        index = packing.row_index()
        self._is_plain = not packing.num_visual and np.array_equal(index, np.arange(packing.batch * packing.length))
        self._row_index = None if self._is_plain else self._to(index)
        real = np.concatenate([packing.text_valid.ravel(), np.ones(packing.num_visual, dtype=bool)])
        self._real_rows = None if real.all() else self._to(np.flatnonzero(real))
        covers = real.all() and len(index) == packing.batch * packing.length
        # row of every column, where each column is a row: the way back into the sequence's order
        self.order = self._to(np.argsort(index)) if covers and not packing.past else None

    def _to(self, array: np.ndarray) -> torch.Tensor:
        return on_device(array, self.device)

    def split(self, hidden, cos, sin):
        """Rows of the lanes: hidden (rows, d), cos and sign-turned sin (rows, 1, head_dim)."""
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        shape = (self.batch, hidden.shape[1])
        cos, sin = (t.expand(*shape, t.shape[-1]).flatten(0, 1) for t in (cos, sin))
        rows = hidden.flatten(0, 1)
        if self._is_plain:
            return rows.clone(), cos[:, None], sin[:, None]
        return (t.index_select(0, self._row_index) for t in (rows, cos[:, None], sin[:, None]))

    def merge(self, hidden, x, stopped=None):
        """Rows back to the shape of `hidden`; columns of padding keep its values."""
        if self._is_plain:
            return x.view(hidden.shape)
        rows = x if stopped is None else torch.cat([x, stopped])
        if self.order is not None:
            return rows.index_select(0, self.order).view(hidden.shape)
        index = self._row_index
        if self._real_rows is not None:
            rows, index = rows.index_select(0, self._real_rows), index.index_select(0, self._real_rows)
        return hidden.flatten(0, 1).index_copy(0, index, rows).view(hidden.shape)

    def by_sample(self, text):
        """Text rows (batch * text length, ...) as (batch, text length, ...)."""
        return text.unflatten(0, self.packing.text_columns.shape)

    def visual_by_sample(self, visual):
        """Packed visual rows (num_visual, ...) as slots (batch, visual length, ...), padded if ragged."""
        shape = self.packing.visual_slots.shape
        if self.packing.packed_is_padded:
            return visual.unflatten(0, shape)
        return visual.index_select(0, self._visual_slots).unflatten(0, shape)

    @cached_property
    def _visual_slots(self) -> torch.Tensor:
        return self._to(self.packing.visual_slots.ravel())

    def text_pattern(self, seen: bool, blind: tuple[bool, ...] | None = None) -> TextPattern:
        """What text queries read of the `seen` store, or of the `rest` store."""
        if (seen, blind) not in self._patterns:
            columns = self.packing.text_columns + self.packing.past
            slots = self._seen if seen else self._rest
            self._patterns[seen, blind] = TextPattern(columns, slots, blind, self.device)
        return self._patterns[seen, blind]

    def visual_pattern(self, attention, stored: bool) -> VisualPattern:
        """What visual queries read, over the slots of `seen` if the layer stores them, else over those of `rest`
        with the call's visual slots between the past and the call's text."""
        if (attention, stored) not in self._patterns:
            slots = self._seen if stored else self._unstored_slots()
            self._patterns[attention, stored] = VisualPattern(attention, self.packing.visual, slots, self.device)
        return self._patterns[attention, stored]

    def _unstored_slots(self) -> Coordinates:
        own = self.packing.slots()
        past = self._rest.column.shape[1] - self.packing.text_columns.shape[1]
        return Coordinates(*(np.concatenate([r[:, :past], o], axis=1) for r, o in zip(self._rest, own)))

    def joint_attention(self, backend: Backend, rows: dict, scale: float) -> torch.Tensor:
        """Causal attention of all rows over all rows, for calls whose every column is a row; returns rows."""
        ordered = (
            rows[name].index_select(0, self.order).unflatten(0, (self.batch, -1)) for name in ("query", "key", "value")
        )
        out = backend.text_attention(*ordered, self._joint_pattern, scale).flatten(0, 1)
        return out.index_select(0, self._row_index)

    @cached_property
    def _joint_pattern(self) -> TextPattern:
        column = np.broadcast_to(np.arange(self.packing.length), (self.batch, self.packing.length))
        sample = np.broadcast_to(np.arange(self.batch)[:, None], column.shape)
        slots = text_coordinates(sample, column, np.ones(column.shape, dtype=bool))
        return TextPattern(column, slots, None, self.device)
