"""The KV cache of both lanes: layers that stand in a transformers DynamicCache and report the logical length.

A layer keeps two stores. `seen` holds the KV heads whose visual keys are read: slots of visual and text tokens.
`rest` holds the other KV heads: slots of text tokens only. Which token lies in which slot is the same in all layers
and kept once, in the `Book`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..layout.packing import Coordinates, text_coordinates
from ..plans.plan import VisualPlan
from .steps import FixedSteps, Step, Steps
from .transformers_internals import LaneLayerBase


class Book:
    """Which token lies in which slot: coordinates of (batch, slots), in the order in which calls appended them.

    plan: the plan under which the cache is filled; another one stores other heads. Decode steps have tables of their
    own on the device (`Steps`); what they and beams did is entered here when somebody asks.
    """

    def __init__(self, batch: int, plan: VisualPlan):
        self.plan = plan
        empty = np.zeros((batch, 0), dtype=np.int64)
        self._slots = text_coordinates(empty, empty, empty.astype(bool))
        self.length = 0  # columns of the sequence, padding and visual tokens included
        self.is_uniform = True  # no padding, and all samples hold the same columns
        self._steps: Steps | None = None
        self.fixed: FixedSteps | None = None  # while steps are the same for every length
        self.lease: Lease | None = None  # while steps are run by a recording
        # what is not entered yet: steps as (column, which samples are not padding or None for all), and samples kept
        self._pending: list[tuple[int, torch.Tensor | None] | torch.Tensor] = []

    def __getstate__(self):
        return {**vars(self), "lease": None}  # of one cache alone

    @property
    def slots(self) -> Coordinates:
        pending, self._pending = self._pending, []
        for entry in pending:
            if isinstance(entry, torch.Tensor):
                self._enter_selection(entry)
            else:
                self._enter_step(*entry)
        return self._slots

    def append(self, slots: Coordinates, length: int) -> None:
        """Add a call's slots."""
        self._append(self.slots, slots)
        self.length += length
        self._steps = None

    def _append(self, earlier: Coordinates, slots: Coordinates) -> None:
        self.is_uniform &= bool(slots.valid.all() and (slots.column == slots.column[:1]).all())
        if not earlier.column.shape[1]:
            self._slots = slots
            return
        # segments of earlier calls keep no identity (only "full" attention reads them)
        earlier = earlier._replace(segment=np.where(earlier.is_visual, np.iinfo(np.int64).max, -1))
        self._slots = Coordinates(*(np.concatenate([a, b], axis=1) for a, b in zip(earlier, slots)))

    def step(self, mask: torch.Tensor | None, own: torch.Tensor | None, device: torch.device) -> Step:
        """The tables of a decode step, whose slot is added. mask: (batch, columns with the step's own) bool, or None;
        own: its last column."""
        if self._steps is None or self._steps.device != device:
            self._steps = Steps(self.slots, self.length, device)
        step = self._steps.next(mask)
        self._pending.append((self.length, own))
        self.length += 1
        return step

    def count_step(self, own: torch.Tensor | None) -> None:
        """Enter a step whose tables are not the book's own. own: as for `step`."""
        self._pending.append((self.length, own))
        self.length += 1
        self._steps = None

    def _enter_step(self, column: int, real: torch.Tensor | None) -> None:
        sample = np.arange(len(self._slots.sample))[:, None]
        valid = np.ones(sample.shape, dtype=bool) if real is None else real.bool().cpu().numpy()[:, None]
        self._append(self._slots, text_coordinates(sample, np.full_like(sample, column), valid))

    def fix(self, capacity: int, device: torch.device) -> None:
        """From here on only decode steps come, up to `capacity` columns, until `thaw`."""
        self.fixed = FixedSteps.after(self.slots, self.length, capacity, device)

    def thaw(self) -> None:
        """Enter the steps that were made since `fix`, as text of all samples: the one look at the device."""
        end, self.fixed = int(self.fixed.column), None
        for column in range(self.length, end):
            self._pending.append((column, None))
        self.length, self._steps = end, None

    @property
    def is_visual(self) -> np.ndarray:
        """(slots,) bool: a slot is visual in all samples or in none."""
        return self.slots.is_visual.any(0)

    def text_slots(self) -> Coordinates:
        """The slots of the `rest` stores."""
        return self.slots.take(np.s_[:, ~self.is_visual])

    def select(self, samples: torch.Tensor) -> None:
        """Keep the given samples, in that order (samples may repeat)."""
        self._pending.append(samples)
        for tables in (self.fixed, None if self.lease is None else self.lease.tables_of(self)):
            if tables is not None:
                tables.select(samples.to(tables.device))
        if self._steps is not None:
            self._steps.select(samples)

    def _enter_selection(self, samples: torch.Tensor) -> None:
        # equal samples need no look at the indices, which may lie on a device
        chosen = np.zeros(len(samples), dtype=np.int64) if self.is_uniform else samples.cpu().numpy()
        taken = self._slots.take(chosen)
        batch = np.broadcast_to(np.arange(len(chosen))[:, None], taken.sample.shape)
        self._slots = taken._replace(sample=batch)

    def crop(self, removed: int) -> None:
        """Forget the last `removed` columns; `stored` tells what remains."""
        slots = self.slots
        self.length -= removed
        valid = slots.valid & (slots.column < self.length)
        kept = valid.any(0).nonzero()[0].max(initial=-1) + 1
        column = np.where(valid, slots.column, 0)
        self._slots = slots._replace(valid=valid, column=column).take(np.s_[:, :kept])
        self.is_uniform &= bool(self._slots.valid.all())
        self._steps = None

    @property
    def stored(self) -> tuple[int, int]:
        """Number of slots in the `seen` and in the `rest` stores."""
        return self.slots.column.shape[1], int((~self.is_visual).sum())


class Store:
    """K and V of some KV heads side by side, (batch, slots, 2, heads, head_dim), growing in place by a quarter."""

    def __init__(self):
        self.buffer: torch.Tensor | None = None
        self.length = 0

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Add slots; returns all so far."""
        end = self.length + new.shape[1]
        if self.buffer is None:
            self.buffer = new.contiguous()  # not a view of more than there is to keep
        elif not self._grows_in_place():
            self.buffer = torch.cat([self.used, new], 1)
        else:
            if end > self.buffer.shape[1]:
                self.buffer = self._grown(end + self.length // 4)
            self.buffer[:, self.length : end] = new
        self.length = end
        return self.used

    def has_room(self) -> bool:
        """Whether the next slot may be written into the buffer, which grows for it."""
        if not self._grows_in_place():
            return False
        if self.length == self.buffer.shape[1]:
            self.buffer = self._grown(self.length + 1 + self.length // 4)
        return True

    @property
    def next(self) -> int:
        """The next slot."""
        return self.length

    def step(self) -> None:
        """The next slot has been written."""
        self.length += 1

    def _grows_in_place(self) -> bool:
        """Not where a backward pass may need what is overwritten, be it for the queries' sake alone, nor outside of the
        inference mode that made the buffer."""
        return not (
            torch.is_grad_enabled()
            or self.buffer.requires_grad
            or self.buffer.is_inference()
            and not torch.is_inference_mode_enabled()
        )

    @property
    def used(self) -> torch.Tensor:
        """The slots in use."""
        return self.buffer if self.length == self.buffer.shape[1] else self.buffer[:, : self.length]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, (batch, slots, heads, head_dim) each."""
        return halves(self.used)

    @property
    def bytes(self) -> int:
        """Bytes of the slots in use."""
        return 0 if self.buffer is None else self.used.numel() * self.buffer.element_size()

    def map(self, change) -> None:
        """Replace keys and values by `change(tensor)`, room and all."""
        if self.buffer is not None:
            self.buffer = change(self.buffer)

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)

    def _grown(self, capacity: int) -> torch.Tensor:
        grown = self.buffer.new_empty(self.buffer.shape[0], capacity, *self.buffer.shape[2:])
        grown[:, : self.length] = self.used
        return grown


class FixedStore:
    """A store of one size, whose next slot only the device knows. at: (1,) int64."""

    def __init__(self, buffer: torch.Tensor, at: torch.Tensor):
        self.buffer, self.at = buffer, at

    @classmethod
    def of(cls, store: Store, capacity: int, at: torch.Tensor) -> FixedStore:
        used = store.used
        with torch.inference_mode(False):
            buffer = used.new_empty(used.shape[0], capacity, *used.shape[2:])
        fixed = cls(buffer, at)
        fixed.load(store)
        return fixed

    def load(self, store: Store) -> None:
        """Take over what another store holds."""
        self.buffer[:, : store.length] = store.used
        self.buffer[:, store.length :] = 0  # unused slots have no weight, but NaN would count for all that

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Write the next slot; returns all, room and all."""
        return self.buffer.index_copy_(1, self.at, new)

    def has_room(self) -> bool:
        return True

    @property
    def next(self) -> torch.Tensor:
        """The next slot, int32."""
        return self.at.int()

    def step(self) -> None:
        """`at` goes on for all stores together."""

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return halves(self.buffer)

    @property
    def bytes(self) -> int:
        """Bytes of all slots, in use or not."""
        return self.buffer.numel() * self.buffer.element_size()

    def map(self, change) -> None:
        self.buffer.copy_(change(self.buffer))

    def thawed(self, length: int) -> Store:
        """Its first slots as a store that grows, which takes the buffer over."""
        store = Store()
        store.buffer, store.length = self.buffer, length
        return store

    def copied(self, length: int) -> Store:
        """Its first slots as a store that grows."""
        store = Store()
        store.buffer, store.length = self.buffer[:, :length].clone(), length
        return store


def halves(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V that lie side by side, (..., 2, heads, head_dim)."""
    return kv.unbind(-3)


class Lease:
    """A recording of decode steps that a cache has borrowed: its layers stand on the recording's stores and tables.

    graph: the recording. places: its stores and tables, for each layer. left: steps there is room for. It ends when
    nothing holds it any more: it knows the layers, and their books alone hold on to it.
    """

    def __init__(self, graph, cache_layers: Sequence[LaneCacheLayer], places: Iterable, left: int):
        self.graph, self.left = graph, left
        self._layers = [weakref.ref(layer) for layer in cache_layers]
        self._tables: dict[int, FixedSteps] = {}
        for layer, (stores, tables) in zip(cache_layers, places):
            layer.move_to(stores)
            self._tables[id(layer.book)] = tables
            layer.book.lease = self

    def tables_of(self, book: Book) -> FixedSteps:
        return self._tables[id(book)]

    def end(self) -> None:
        """Back to stores of the cache's own."""
        for layer in filter(None, (known() for known in self._layers)):
            layer.move_back()


class LaneCacheLayer(LaneLayerBase):
    """One decoder layer's cache. The layer with `leads` keeps the shared book up to date for all of them."""

    def __init__(self, book: Book, leads: bool):
        super().__init__()
        self.book, self.leads = book, leads
        self.seen, self.rest = Store(), Store()

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may take it for a static cache's."""
        return self.book.fixed is not None

    def fix(self, capacity: int) -> None:
        """Make room for `capacity` columns; until `thaw` only decode steps come, which all have the same shapes."""
        device = (self.rest if self.seen.buffer is None else self.seen).buffer.device
        if self.leads:
            self.book.fix(capacity, device)
        fixed = self.book.fixed
        self.seen, self.rest = (
            store if store.buffer is None else FixedStore.of(store, columns.shape[1], at)
            for store, columns, at in zip((self.seen, self.rest), fixed.columns, fixed.at)
        )

    def thaw(self) -> None:
        """Back to stores that grow."""
        if self.book.fixed is not None:
            self.book.thaw()
        self.seen, self.rest = (
            store.thawed(length) if isinstance(store, FixedStore) else store
            for store, length in zip((self.seen, self.rest), self.book.stored)
        )

    def __getstate__(self):
        return vars(self) if self.book.lease is None else {**vars(self), **self._own_stores()}

    def _own_stores(self) -> dict[str, Store]:
        """Copies of what a recording's stores hold."""
        named = zip(("seen", "rest"), self.book.stored)
        stores = ((name, length, getattr(self, name)) for name, length in named)
        return {name: store.copied(length) for name, length, store in stores if isinstance(store, FixedStore)}

    def move_to(self, stores: Sequence[FixedStore | None]) -> None:
        """Into the stores of a recording, None for one that is empty."""
        for name, store in zip(("seen", "rest"), stores):
            if store is not None:
                store.load(getattr(self, name))
                setattr(self, name, store)

    def move_back(self) -> None:
        """Out of the stores of a recording."""
        for name, store in self._own_stores().items():
            setattr(self, name, store)
        self.book.lease = None

    def leave(self) -> None:
        """Before anything but a decode step: give back a recording that is borrowed."""
        if self.book.lease is not None:
            self.book.lease.end()

    @property
    def kv_bytes(self) -> int:
        return self.seen.bytes + self.rest.bytes

    def get_seq_length(self) -> int | torch.Tensor:
        """Columns of the sequence so far, padding and visual tokens included; on the device of a static cache."""
        return self.book.length if self.book.fixed is None else self.book.fixed.column

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.book.length + query_length if self.book.fixed is None else self.book.fixed.capacity), 0

    def get_max_length(self) -> int:
        return -1 if self.book.fixed is None else self.book.fixed.capacity

    get_max_cache_shape = get_max_length  # the name before transformers 5.20

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        store = self.rest if self.seen.buffer is None else self.seen
        batch = store.buffer.shape[0]
        self._select(torch.arange(batch).repeat_interleave(repeats))

    def _select(self, samples: torch.Tensor) -> None:
        if self.book.lease is not None and len(samples) != self.book.lease.graph.shape.batch:
            self.leave()
        if self.leads:
            self.book.select(samples)
        for store in (self.seen, self.rest):
            store.map(lambda t: t.index_select(0, samples.to(t.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns (a positive value, the older form, is the length to keep)."""
        if self.book.fixed is not None:
            raise NotImplementedError("crop: got a static cache, expected a dynamic one")
        self.leave()
        tokens_to_remove = int(tokens_to_remove)  # a 0-d tensor where drafts are rejected
        if self.leads:
            length = self.book.length
            self.book.crop(-tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0))
        seen, rest = self.book.stored
        self.seen.crop(seen)
        self.rest.crop(rest)

    def reset(self) -> None:
        self.leave()
        if self.leads:
            self.book.__init__(len(self.book.slots.sample), self.book.plan)
        self.seen, self.rest = Store(), Store()
