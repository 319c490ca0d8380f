"""Decode steps of growing caches as recordings (`recorded.py`), one for each batch size and bucket of cached slots.

A recording owns its stores and tables. A cache borrows it, moves in, and nobody else gets it until the cache ends, does
something else than a decode step, or has filled it. So caches in different threads or generators have their own.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bound import Bound
from .cache import FixedStore, LaneCacheLayer, Lease
from .lanes import LaneExecutor, linked
from .recorded import bucket, record
from .steps import FixedSteps, mask_of_step

LIMIT = 256 * 2**20  # bytes of stores that nobody has borrowed; the last one is kept whatever it holds
_ROOM = 64  # steps that a recording has room for at least


class Shape(NamedTuple):
    """What decides the shapes of a step. widths: of the `seen` and `rest` stores, once for each book. stores: for each
    layer and store, (heads and width, dtype), or None. inputs: shape, dtype and device of each."""

    batch: int
    columns: int
    widths: tuple[tuple[int, int], ...]
    stores: tuple
    inputs: tuple


class _Stores(NamedTuple):
    seen: FixedStore | None
    rest: FixedStore | None


class StepGraph:
    """A recorded decode step with its stores and tables."""

    def __init__(self, executor: LaneExecutor, bound: Bound, shape: Shape, inputs: Sequence[Tensor]):
        self.shape, self._executor, self._bound, self._places = shape, executor, bound, bound.places()
        device = inputs[0].device
        self._tables = [FixedSteps(shape.batch, widths, shape.columns, device) for widths in shape.widths]
        self._books = executor.books()
        with torch.inference_mode(False):
            self._mask = torch.ones(shape.batch, shape.columns, dtype=torch.bool, device=device)
            self._stores = [self._empty(layer, device) for layer in range(len(shape.stores))]
        self._is_masked = False
        for tables in self._tables:
            for valid in tables.valid:
                valid.fill_(True)  # a step that reads nothing would fill the stores with NaN
        self._run = record(self._step, inputs)

    def _empty(self, layer: int, device: torch.device) -> _Stores:
        tables, found = self._tables[self._books[layer]], []
        for held, columns, at in zip(self.shape.stores[layer], tables.columns, tables.at):
            if held is None:
                found.append(None)
                continue
            size, dtype = held
            found.append(FixedStore(torch.zeros(*columns.shape, *size, dtype=dtype, device=device), at))
        return _Stores(*found)

    def _step(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        step = linked([tables.next(self._mask) for tables in self._tables])
        out = self._executor.run(hidden, cos, sin, step, self._stores, bound=self._bound)
        for tables in self._tables:
            tables.advance()
        return [out]

    @property
    def bytes(self) -> int:
        return sum(store.bytes for stores in self._stores for store in stores if store is not None)

    def holds(self, bound: Bound, places: tuple) -> bool:
        """Whether modules and weights are those that were recorded."""
        return bound is self._bound and places == self._places

    def lend(self, cache_layers: Sequence[LaneCacheLayer]) -> Lease:
        """Move a cache in."""
        self._run.wait()
        for tables, layer in zip(self._tables, _leading(cache_layers)):
            tables.load(layer.book.slots, layer.book.length)
        self._mask.fill_(True)
        self._is_masked = False
        left = min(self.shape.columns - cache_layers[0].book.length, *self._room(cache_layers))
        return Lease(self, cache_layers, zip(self._stores, (self._tables[book] for book in self._books)), left)

    def _room(self, cache_layers):
        for widths, layer in zip(self.shape.widths, _leading(cache_layers)):
            yield from (width - taken for width, taken in zip(widths, layer.book.stored))

    def run(self, inputs: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """The next step's hidden states, (batch, 1, d). mask: (batch, columns with its own) bool, None = none."""
        if mask is not None:
            self._run.wait()
            self._mask[:, : mask.shape[1]] = mask
        elif self._is_masked:
            self._mask.fill_(True)
        self._is_masked = mask is not None
        (hidden,) = self._run(inputs)
        return hidden


class StepGraphs:
    """The recorded steps of an executor. Safe under threads. A copy of it, and what is pickled, has none."""

    def __init__(self, executor: LaneExecutor, limit: int = LIMIT):
        self.executor, self.limit = executor, limit
        self._free: list[StepGraph] = []  # the one that was used last comes last
        self._returned: deque[StepGraph] = deque()  # by finalizers, which may come while the lock is held
        self._lock = threading.Lock()

    def __reduce__(self):
        return StepGraphs, (self.executor, self.limit)

    def forget(self) -> None:
        """Let those go that nobody has borrowed."""
        with self._lock:
            self._returned.clear()
            self._free = []

    def step(
        self, cache_layers: Sequence[LaneCacheLayer], bound: Bound, inputs: Sequence[Tensor], mask: Tensor | None
    ) -> Tensor:
        """A decode step on filled cache layers. inputs: hidden (batch, 1, d), cos and sin as for `LaneExecutor.run`,
        whose result it gives. mask: as for `LaneExecutor.step`."""
        lease, places = cache_layers[0].book.lease, bound.places()
        described = tuple((each.shape, each.dtype, each.device) for each in inputs)
        if lease is not None:
            graph = lease.graph
            if not (lease.left and graph.holds(bound, places) and graph.shape.inputs == described):
                lease.end()
                lease = None
        if lease is None:
            lease = self._borrow(cache_layers, bound, places, inputs, described)
        mask = mask_of_step(mask, inputs[0].device)
        own = None if mask is None else mask[:, -1].clone()
        hidden = lease.graph.run(inputs, mask)
        lease.left -= 1
        for layer in _leading(cache_layers):
            layer.book.count_step(own)
        return hidden

    def _borrow(self, cache_layers, bound: Bound, places: tuple, inputs, described: tuple) -> Lease:
        books = [layer.book for layer in _leading(cache_layers)]
        shape = Shape(
            len(books[0].slots.sample),
            bucket(books[0].length + _ROOM),
            tuple(tuple(bucket(taken + _ROOM) for taken in book.stored) for book in books),
            tuple(tuple(map(_held, (layer.seen, layer.rest))) for layer in cache_layers),
            described,
        )
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            self._free = [graph for graph in self._free if graph.holds(bound, places)]
            found = next((graph for graph in reversed(self._free) if graph.shape == shape), None)
            if found is not None:
                self._free.remove(found)
            while len(self._free) > 1 and sum(graph.bytes for graph in self._free) > self.limit:
                del self._free[0]
        graph = StepGraph(self.executor, bound, shape, inputs) if found is None else found
        lease = graph.lend(cache_layers)
        weakref.finalize(lease, self._returned.append, graph).atexit = False
        return lease


def _leading(cache_layers: Sequence[LaneCacheLayer]) -> list[LaneCacheLayer]:
    return [layer for layer in cache_layers if layer.leads]


def _held(store) -> tuple | None:
    return None if store.buffer is None else (tuple(store.buffer.shape[2:]), store.buffer.dtype)
