"""Tables of calls that may come again, kept within a bound of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator

import numpy as np
import torch

from .call import Call

LIMIT = 64 * 2**20  # bytes


class KeptCalls:
    """Calls by what their tables depend on. While they hold more than `limit` bytes the least recently used one goes.

    Tables are built while a call runs, so calls are weighed when the next one is kept: that one comes on top of the
    limit. Safe under threads. A copy of it, and what is pickled, is empty.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self._calls: OrderedDict[Hashable, Call] = OrderedDict()
        self._bytes: dict[Hashable, int] = {}  # of calls not asked for since they were weighed
        self._lock = threading.Lock()

    def __reduce__(self):
        return KeptCalls, (self.limit,)

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def bytes(self) -> int:
        with self._lock:
            return sum(map(held_bytes, self._calls.values()))

    def get(self, key: Hashable) -> Call | None:
        with self._lock:
            if key not in self._calls:
                return None
            self._calls.move_to_end(key)
            self._bytes.pop(key, None)  # a run may add tables
            return self._calls[key]

    def keep(self, key: Hashable, call: Call) -> None:
        with self._lock:
            for known, kept in self._calls.items():
                if known not in self._bytes:
                    self._bytes[known] = held_bytes(kept)
            while self._calls and sum(self._bytes.values()) > self.limit:
                self._bytes.pop(self._calls.popitem(last=False)[0])
            self._calls[key] = call
            self._bytes.pop(key, None)


def held_bytes(root, arrays: bool = True) -> int:
    """Bytes of the storages of all tensors (and arrays) that an object holds on to, each counted once and whole."""
    sizes: dict[int, int] = {}
    for item in _reachable(root):
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
        elif arrays:
            while isinstance(item.base, np.ndarray):
                item = item.base
            sizes[id(item)] = item.nbytes
    return sum(sizes.values())


def _reachable(root) -> Iterator[torch.Tensor | np.ndarray]:
    seen, left = {}, [root]
    while left:
        item = left.pop()
        if isinstance(item, torch.Tensor | np.ndarray):
            yield item
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        elif hasattr(item, "__dict__") and not isinstance(item, type) and id(item) not in seen:
            seen[id(item)] = item
            left += list(vars(item).values())
