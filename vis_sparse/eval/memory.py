"""Bytes that really exist: tensors alive during a call, and what a KV cache holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..executor.kept_calls import held_bytes


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors created while it is on: `peak` at most, `live` now.

    Weights and inputs existed before and are not counted; the KV cache that the call fills is. Works on any device.
    What one operator allocates and frees inside itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # an output that shares memory with an argument is a view or an in-place result, no new memory
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        output = func(*args, **kwargs)
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._storages:
                self._track(storage)
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_):
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)


def cache_bytes(cache) -> int:
    """Bytes of all storages that the layers of a transformers `Cache` hold on to; a tensor that is a view of a larger
    storage counts with all of it."""
    return held_bytes(cache.layers, arrays=False)


def _tensors(tree) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
