"""One call of the executor: its index tables and masks on the device, kept for as long as the layout repeats."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from ..kernels import Backend
from ..kernels.patterns import TextPattern, VisualPattern
from ..layout.packing import Coordinates, Packing, on_device, places_of, text_coordinates


class Call:
    """Tables of one call on a device.

    packing: the call's rows. seen, rest: coordinates of the slots of the two stores after the call's own were
    appended, (batch, slots). mask: (batch, columns) bool, False = padding; None = none, or as the slots say.
    in_sequence: the rows of `packing` at their columns of the sequence, where `packing` has others (`over_left`).
    ranks: (batch,) the text row of each sample, counted in the padded text, whose attention ranks visual tokens; None =
    the last. general: whether tables take the one form that fits every text of as many rows (`prompt_graphs`).
    """

    is_step = False

    def __init__(
        self,
        packing: Packing,
        seen: Coordinates,
        rest: Coordinates,
        device: torch.device,
        mask: np.ndarray | None = None,
        in_sequence: Packing | None = None,
        ranks: np.ndarray | None = None,
        general: bool = False,
    ):
        self.packing, self.device, self.mask, self._ranks = packing, device, mask, ranks
        self.in_sequence = packing if in_sequence is None else in_sequence
        self._seen, self._rest = seen, rest
        self._patterns: dict = {}
        self.num_text = packing.num_text
        self.batch = packing.batch
        self._text_shape, self._visual_shape = packing.text_columns.shape, packing.visual_slots.shape
        self._packed_is_padded = packing.packed_is_padded
        self._general = general
        self.has_run = False  # whether the backend's tables have been built
        self.alike: dict[tuple, tuple] = {}  # what recordings go by

    @classmethod
    def over(
        cls,
        packing: Packing,
        book,
        mask: np.ndarray | None,
        device: torch.device,
        ranks: np.ndarray | None = None,
        general: bool = False,
    ) -> Call:
        """The tables of a call whose slots `book` already has."""
        seen, rest = book.slots.masked(mask), book.text_slots().masked(mask)
        return cls(packing, seen, rest, device, mask, ranks=ranks, general=general)

    @classmethod
    def over_left(
        cls, left: Packing, book, mask: np.ndarray | None, device: torch.device, ranks: np.ndarray | None = None
    ) -> Call:
        """The tables of a call of which only some visual rows are left, whose slots `book` already has.

        Columns are counted without those that left: what is left is a shorter sequence, over which plain causal
        attention is plain again. (Positions went into the rows' rotation; columns only say who comes first.)
        """
        seen, rest = book.slots.masked(mask), book.text_slots().masked(mask)
        places = places_of(seen, left.past + left.length)
        moved = (tables.moved(places) for tables in (left, seen, rest))
        return cls(*moved, device, mask, left, ranks)

    def leaving(self, kept: np.ndarray, book) -> Call:
        """The tables of the layers that only the packed visual rows `kept` reach; appends their slots to `book`."""
        left = self.in_sequence.keep(kept)
        book.append(left.slots(), left.length)
        return Call.over_left(left, book, self.mask, self.device, self._ranks)

    @property
    def shapes(self) -> tuple:
        """Of its text rows and visual slots, and the number of its visual rows."""
        return self._text_shape, self._visual_shape, self.packing.num_visual

    @property
    def tables(self) -> dict:
        """The tables that its layers read, built so far."""
        return {"patterns": self._patterns, "slots": None if self._packed_is_padded else self._visual_slots}

    @cached_property
    def own_slots(self) -> Coordinates:
        """The slots that the call adds."""
        return self.in_sequence.slots()

    @cached_property
    def _index(self) -> np.ndarray:
        return self.packing.row_index()

    @cached_property
    def _is_plain(self) -> bool:
        rows = self.packing.batch * self.packing.length
        return not self.packing.num_visual and np.array_equal(self._index, np.arange(rows))

    @cached_property
    def _row_index(self) -> torch.Tensor:
        return self._to(self._index)

    @cached_property
    def _rows_of_sequence(self) -> torch.Tensor:
        """Where the rows lie in the call's hidden states."""
        return self._row_index if self.in_sequence is self.packing else self._to(self.in_sequence.row_index())

    @cached_property
    def _is_real(self) -> np.ndarray:
        return np.concatenate([self.packing.text_valid.ravel(), np.ones(self.packing.num_visual, dtype=bool)])

    @cached_property
    def _real_rows(self) -> torch.Tensor | None:
        return None if self._is_real.all() else self._to(np.flatnonzero(self._is_real))

    @cached_property
    def order(self) -> torch.Tensor | None:
        """Row of every column, where each column is a row: the way back into the sequence's order."""
        if self._general:
            return None
        covers = self._is_real.all() and len(self._index) == self.packing.batch * self.packing.length
        return self._to(np.argsort(self._index)) if covers and not self.packing.past else None

    @property
    def has_every_column(self) -> bool:
        """Whether the sequence that rows may be ordered by is that of the hidden states: no token has left before."""
        return self.in_sequence is self.packing

    def _to(self, array: np.ndarray) -> torch.Tensor:
        return on_device(array, self.device)

    def sequence(self, hidden, cos, sin):
        """The columns as rows: hidden (rows, d), cos and sign-turned sin (rows, 1, head_dim)."""
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        shape = (self.batch, hidden.shape[1])
        cos, sin = (t.expand(*shape, t.shape[-1]).flatten(0, 1)[:, None] for t in (cos, sin))
        return hidden.flatten(0, 1).clone(), cos, sin

    def split(self, hidden, cos, sin):
        """As `sequence`, the rows of the lanes."""
        rows, cos, sin = self.sequence(hidden, cos, sin)
        if self._is_plain:
            return rows, cos, sin
        return (t.index_select(0, self._rows_of_sequence) for t in (rows, cos, sin))

    def to_lanes(self, rows):
        """Rows in the order of the sequence, where every column is a row (`order`), as lanes."""
        return rows.index_select(0, self._row_index)

    def to_sequence(self, rows):
        """The way back."""
        return rows.index_select(0, self.order)

    def merge(self, hidden, x, stopped=None):
        """Rows back to the shape of `hidden`; columns of padding, and of visual tokens that have no row, keep its
        values."""
        if self._is_plain:
            return x.view(hidden.shape)
        rows = x if stopped is None else torch.cat([x, stopped])
        if self.order is not None and self.has_every_column:
            return rows.index_select(0, self.order).view(hidden.shape)
        index = self._rows_of_sequence
        if self._real_rows is not None:
            rows, index = rows.index_select(0, self._real_rows), index.index_select(0, self._real_rows)
        return hidden.flatten(0, 1).index_copy(0, index, rows).view(hidden.shape)

    def by_sample(self, text):
        """Text rows (batch * text length, ...) as (batch, text length, ...)."""
        return text.unflatten(0, self._text_shape)

    def visual_by_sample(self, visual):
        """Packed visual rows (num_visual, ...) as slots (batch, visual length, ...), padded if ragged."""
        if not self._packed_is_padded:
            visual = visual.index_select(0, self._visual_slots)
        return visual.unflatten(0, self._visual_shape)

    @cached_property
    def _visual_slots(self) -> torch.Tensor:
        return self._to(self.packing.visual_slots.ravel())

    @cached_property
    def _slot_rows(self) -> torch.Tensor:
        text, visual = np.split(self._index, [self.num_text])
        shapes = self._visual_shape, self._text_shape
        own = [rows.reshape(shape) for rows, shape in zip((visual, text), shapes)]
        return self._to(np.concatenate(own, axis=1).ravel())

    def by_slot(self, rows):
        """Rows in the order of the sequence as the call's own slots of the `seen` store, (batch, slots, ...)."""
        return rows.index_select(0, self._slot_rows).unflatten(0, (self.batch, -1))

    def by_packed(self, seen):
        """Of the `seen` store's slots (batch, slots, ...), those of the packed visual rows, (num_visual, ...)."""
        text = self.packing.text_columns.shape[1]
        end = seen.shape[1] - text
        own = seen[:, end - self.packing.visual_slots.shape[1] : end].flatten(0, 1)
        if self.packing.packed_is_padded:
            return own
        return own.index_select(0, self._to(np.flatnonzero(self.packing.visual_valid)))

    def ranking_rows(self, text):
        """Of text rows (batch, text length, ...), those that rank visual tokens, (batch, ...)."""
        if self._ranks is None:
            return text[:, -1]
        return text[self._to(np.arange(self.batch)), self._to(self._ranks)]

    @cached_property
    def unread_slots(self) -> torch.Tensor | None:
        """(batch, slots) bool: what the ranking rows do not read of the `seen` store, in heads that read visual keys;
        None if nothing. Nothing visual comes after them (`tokens.check_text_follows`)."""
        read = self._seen.valid
        if self._ranks is not None:
            last = self.packing.text_columns[np.arange(self.batch), self._ranks] + self.packing.past
            read = read & (self._seen.column <= last[:, None])
        return None if read.all() else self._to(~read)

    def text_pattern(self, seen: bool, blind: tuple[bool, ...] | None = None) -> TextPattern:
        """What text queries read of the `seen` store, or of the `rest` store."""
        if (seen, blind) not in self._patterns:
            columns = self.packing.text_columns + self.packing.past
            slots = self._seen if seen else self._rest
            unblind = None if blind is None else self.text_pattern(seen)
            self._patterns[seen, blind] = TextPattern(columns, slots, blind, self.device, self._general, unblind)
        return self._patterns[seen, blind]

    def visual_pattern(self, attention, stored: bool) -> VisualPattern:
        """What visual queries read, over the slots of `seen` if the layer stores them, else over those of `rest`
        with the call's visual slots between the past and the call's text."""
        if (attention, stored) not in self._patterns:
            slots = self._seen if stored else self._unstored_slots()
            visual = self.packing.visual
            self._patterns[attention, stored] = VisualPattern(attention, visual, slots, self.device, self._general)
        return self._patterns[attention, stored]

    def _unstored_slots(self) -> Coordinates:
        own = self.packing.slots()
        past = self._rest.column.shape[1] - self.packing.text_columns.shape[1]
        return Coordinates(*(np.concatenate([r[:, :past], o], axis=1) for r, o in zip(self._rest, own)))

    def joint_attention(self, backend: Backend, query: torch.Tensor, kv, scale: float) -> torch.Tensor:
        """Causal attention of all rows over all rows, in the order of the sequence, for calls whose every column is a
        row. query (rows, heads, head_dim), kv: keys and values. Returns (rows, heads x head_dim)."""
        query, *kv = (rows.unflatten(0, (self.batch, -1)) for rows in (query, *kv))
        out = backend.text_attention(query, *kv, self._joint_pattern, scale)
        return out.reshape(self.batch * out.size(1), -1)

    @cached_property
    def _joint_pattern(self) -> TextPattern:
        column = np.broadcast_to(np.arange(self.packing.length), (self.batch, self.packing.length))
        sample = np.broadcast_to(np.arange(self.batch)[:, None], column.shape)
        slots = text_coordinates(sample, column, np.ones(column.shape, dtype=bool))
        return TextPattern(column, slots, None, self.device)
