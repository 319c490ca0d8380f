"""Whole prompts as recordings (`recorded.py`): one for each shape of the tables of a call, not for each layout.

The text of a prompt is padded to a bucket, and its tables take the one form that fits every text of the bucket (`Call`,
`general`). Then calls with as many images of the same sizes differ in what their tables say, and in nothing else, and
one recording runs them all. Two calls are taken for alike only if every table has its like in the other, and every
number beside the tables is the same.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.patterns import TextPattern
from .bound import Bound
from .cache import LaneCacheLayer, Store
from .call import Call
from .lanes import LaneExecutor
from .recorded import record

LIMIT = 2**30  # bytes of inputs, tables and outputs of recordings; the last one is kept whatever it holds
_REMEMBERED = 1024  # shapes that were seen
_SILENT = ("pairs", "device")  # what counts and places, and decides nothing


class _Stores(NamedTuple):
    seen: Store
    rest: Store


class _Rows:
    """A call whose rows have been split already and are merged later."""

    def __init__(self, call: Call):
        self._call = call

    def __getattr__(self, name: str):
        return getattr(self._call, name)

    def split(self, hidden, cos, sin):
        return hidden, cos, sin

    def merge(self, hidden, x, stopped=None):
        return x if stopped is None else torch.cat([x, stopped])


class PromptGraph:
    """A recorded prompt. inputs: rows, cos and sin as `Call.split` gives them, and what is added to visual rows."""

    def __init__(self, executor: LaneExecutor, bound: Bound, call: Call, inputs: Sequence[Tensor], cached: bool):
        self._executor, self._bound, self._cached = executor, bound, cached
        self._places, self._copies = bound.places(), executor.kept_cuts.tensors()
        self.call = copy.deepcopy(call)  # tables that stay where they are
        self.signature, self._tables = described(self.call)
        self._holds: weakref.ref = weakref.ref(call)  # whose tables they are now
        self._filled: list[tuple[int, int]] = []  # layer and store of each output behind the rows
        self._busy = threading.Lock()
        self._run = record(self._prompt, inputs)
        self.bytes = self._run.bytes + sum(each.nbytes for each in self._tables)

    def _prompt(self, rows: Tensor, cos: Tensor, sin: Tensor, *added: Tensor) -> list[Tensor]:
        layers = [_Stores(Store(), Store()) for _ in self._executor.layers] if self._cached else None
        out = self._executor.run(rows, cos, sin, _Rows(self.call), layers, None, added, self._bound)
        self._filled = [
            (index, place)
            for index, stores in enumerate(layers or ())
            for place, store in enumerate(stores)
            if store.buffer is not None
        ]
        return [out, *(layers[index][place].buffer for index, place in self._filled)]

    def holds(self, bound: Bound, places: tuple, copies: list[Tensor]) -> bool:
        """Whether modules, weights and their copies are those that were recorded."""
        same = len(copies) == len(self._copies) and all(a is b for a, b in zip(copies, self._copies))
        return bound is self._bound and places == self._places and same

    def __call__(self, call: Call, tables: Sequence[Tensor], inputs: Sequence[Tensor], cache_layers) -> Tensor:
        """The rows that `call` gives for its inputs; fills the cache layers. tables: its own, as `described`."""
        with self._busy:
            self._run.wait()
            if self._holds() is not call:
                for own, given in zip(self._tables, tables):
                    own.copy_(given)
                self._holds = weakref.ref(call)
            rows, *buffers = self._run(inputs)
        for (index, place), buffer in zip(self._filled, buffers):
            layer = cache_layers[index]
            store = (layer.seen, layer.rest)[place]
            store.buffer, store.length = buffer, buffer.shape[1]
        return rows


class PromptGraphs:
    """The recorded prompts of an executor. Safe under threads. A copy of it, and what is pickled, has none."""

    def __init__(self, executor: LaneExecutor, limit: int = LIMIT):
        self.executor, self.limit = executor, limit
        self._graphs: OrderedDict[tuple, list[PromptGraph]] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return PromptGraphs, (self.executor, self.limit)

    def forget(self) -> None:
        with self._lock:
            self._graphs.clear()

    def run(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, call: Call, cache_layers: Sequence[LaneCacheLayer] | None,
        added: Sequence[Tensor], bound: Bound,
    ) -> Tensor:  # fmt: skip
        """As `LaneExecutor.run`, of a whole prompt with a `general` call. A shape's first prompt runs operation by
        operation, its second is recorded."""
        inputs = (*call.split(hidden, cos, sin), *added)
        key = _outline(call, inputs, cache_layers is not None)
        places, copies = bound.places(), self.executor.kept_cuts.tensors()
        with self._lock:
            known = [graph for graph in self._graphs.get(key, ()) if graph.holds(bound, places, copies)]
            is_new = key not in self._seen
            self._seen[key] = None
            while len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        if known and key not in call.alike and not call.has_run:
            build_like(call, known[0].call)
        if known or call.has_run:
            signature, tables = call.alike[key] = call.alike.get(key) or described(call)
            graph = next((graph for graph in known if graph.signature == signature), None)
            if graph is None and call.has_run and not is_new:
                graph = self._recorded(key, known, bound, call, inputs, cache_layers)
            if graph is not None:
                return call.merge(hidden, graph(call, tables, inputs, cache_layers))
        out = self.executor.run(hidden, cos, sin, call, cache_layers, None, added, bound)
        call.has_run = True
        call.alike.pop(key, None)
        if not (is_new or known):
            self._recorded(key, known, bound, call, inputs, cache_layers)
        return out

    def _recorded(self, key: tuple, known: list[PromptGraph], bound: Bound, call: Call, inputs, cache_layers):
        graph = PromptGraph(self.executor, bound, call, inputs, cache_layers is not None)
        with self._lock:
            self._graphs[key] = [*known, graph]
            self._graphs.move_to_end(key)
            while len(self._graphs) > 1 and sum(g.bytes for each in self._graphs.values() for g in each) > self.limit:
                self._graphs.popitem(last=False)
        return graph


def _outline(call: Call, inputs: Sequence[Tensor], cached: bool) -> tuple:
    """What calls have in common that may be alike."""
    grids = tuple((s.sample, s.frames, s.height, s.width) for s in call.packing.layout.segments)
    return call.shapes, grids, cached, *((each.shape, each.dtype, each.device) for each in inputs)


def described(call: Call) -> tuple[tuple, list[Tensor]]:
    """A call's tables in a fixed order, and all else that decides what its run does."""
    tables: list[Tensor] = []
    return _describe(call.tables, tables), tables


def _describe(item, tables: list[Tensor]):
    if isinstance(item, Tensor):
        tables.append(item)
        return "table", item.shape, item.dtype
    if isinstance(item, np.ndarray):
        return None  # what tables are made from
    if isinstance(item, dict):
        return tuple((key, _describe(item[key], tables)) for key in sorted(item, key=repr) if key not in _SILENT)
    if isinstance(item, list | tuple):
        return tuple(_describe(each, tables) for each in item)
    if type(item).__hash__ is not None and not hasattr(item, "__dict__"):
        return item
    return type(item), _describe(vars(item), tables)


def build_like(call: Call, model: Call) -> None:
    """Build the tables that `model` has."""
    for key, pattern in model.tables["patterns"].items():
        ask = call.text_pattern if isinstance(pattern, TextPattern) else call.visual_pattern
        _build(ask(*key), pattern)


def _build(own, model) -> None:
    for name, value in list(vars(model).items()):
        if name == "_derived":
            for build, settings in list(value):
                own.derive(build, *settings)
        elif name == "_bias":
            for dtype in list(value):
                own.bias(dtype)
        elif isinstance(value, np.ndarray | Tensor) or not hasattr(value, "__dict__") and not isinstance(value, tuple):
            getattr(own, name)
        elif isinstance(value, tuple):
            for mine, other in zip(getattr(own, name) or (), value):
                if hasattr(other, "__dict__"):
                    _build(mine, other)
        elif type(mine := getattr(own, name)) is type(value):
            _build(mine, value)
