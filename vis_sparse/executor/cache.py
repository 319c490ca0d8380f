"""The KV cache of both lanes: layers that stand in a transformers DynamicCache and report the logical length.

A layer keeps two stores. `seen` holds the KV heads whose visual keys are read: slots of visual and text tokens.
`rest` holds the other KV heads: slots of text tokens only. Which token lies in which slot is the same in all layers
and kept once, in the `Book`.
"""

from __future__ import annotations

import numpy as np
import torch

from ..layout.packing import Coordinates, text_coordinates
from ..plans.plan import VisualPlan
from .transformers_internals import LaneLayerBase


class Book:
    """Which token lies in which slot: coordinates of (batch, slots), in the order in which calls appended them.

    plan: the plan under which the cache is filled; another one stores other heads.
    """

    def __init__(self, batch: int, plan: VisualPlan):
        self.plan = plan
        empty = np.zeros((batch, 0), dtype=np.int64)
        self.slots = text_coordinates(empty, empty, empty.astype(bool))
        self.length = 0  # columns of the sequence, padding and visual tokens included
        self.is_uniform = True  # no padding, and all samples hold the same columns

    def append(self, slots: Coordinates, length: int) -> None:
        """Add a call's slots; segments of earlier calls keep no identity (only "full" attention reads them)."""
        earlier = self.slots._replace(segment=np.where(self.slots.is_visual, np.iinfo(np.int64).max, -1))
        self.slots = Coordinates(*(np.concatenate([a, b], axis=1) for a, b in zip(earlier, slots)))
        self.length += length
        self.is_uniform &= bool(slots.valid.all() and (slots.column == slots.column[:1]).all())

    @property
    def is_visual(self) -> np.ndarray:
        """(slots,) bool: a slot is visual in all samples or in none."""
        return self.slots.is_visual.any(0)

    def text_slots(self) -> Coordinates:
        """The slots of the `rest` stores."""
        return self.slots.take(np.s_[:, ~self.is_visual])

    def select(self, samples: torch.Tensor) -> None:
        """Keep the given samples, in that order (samples may repeat)."""
        # equal samples need no look at the indices, which may lie on a device
        chosen = np.zeros(len(samples), dtype=np.int64) if self.is_uniform else samples.cpu().numpy()
        taken = self.slots.take(chosen)
        batch = np.broadcast_to(np.arange(len(chosen))[:, None], taken.sample.shape)
        self.slots = taken._replace(sample=batch)

    def crop(self, removed: int) -> None:
        """Forget the last `removed` columns; `stored` tells what remains."""
        self.length -= removed
        valid = self.slots.valid & (self.slots.column < self.length)
        kept = valid.any(0).nonzero()[0].max(initial=-1) + 1
        column = np.where(valid, self.slots.column, 0)
        self.slots = self.slots._replace(valid=valid, column=column).take(np.s_[:, :kept])
        self.is_uniform &= bool(self.slots.valid.all())

    @property
    def stored(self) -> tuple[int, int]:
        """Number of slots in the `seen` and in the `rest` stores."""
        return self.slots.column.shape[1], int((~self.is_visual).sum())


class Store:
    """K and V of some KV heads, (batch, slots, heads, head_dim) each, growing in place by a quarter."""

    def __init__(self):
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.length = 0

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add slots; returns all keys and values so far."""
        end = self.length + key.shape[1]
        if self.buffers is None:
            self.buffers = (key, value)
        elif not self._grows_in_place():
            self.buffers = tuple(torch.cat([old, new], 1) for old, new in zip(self.tensors, (key, value)))
        else:
            if end > self.buffers[0].shape[1]:
                self.buffers = tuple(self._grown(t, end + self.length // 4) for t in self.tensors)
            for buffer, new in zip(self.buffers, (key, value)):
                buffer[:, self.length : end] = new
        self.length = end
        return self.tensors

    def _grows_in_place(self) -> bool:
        """Not where a backward pass may need what is overwritten, be it for the queries' sake alone, nor outside of the
        inference mode that made the buffers."""
        return not torch.is_grad_enabled() and not any(
            t.requires_grad or t.is_inference() and not torch.is_inference_mode_enabled() for t in self.buffers
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.length == self.buffers[0].shape[1]:
            return self.buffers
        return tuple(t[:, : self.length] for t in self.buffers)

    @property
    def bytes(self) -> int:
        """Bytes of the slots in use."""
        return 0 if self.buffers is None else sum(t.numel() * t.element_size() for t in self.tensors)

    def map(self, change) -> None:
        """Replace keys and values by `change(tensor)`."""
        if self.buffers is not None:
            self.buffers = tuple(change(t) for t in self.tensors)

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)

    @staticmethod
    def _grown(tensor: torch.Tensor, capacity: int) -> torch.Tensor:
        grown = tensor.new_empty(tensor.shape[0], capacity, *tensor.shape[2:])
        grown[:, : tensor.shape[1]] = tensor
        return grown


class LaneCacheLayer(LaneLayerBase):
    """One decoder layer's cache. The layer with `leads` keeps the shared book up to date for all of them."""

    def __init__(self, book: Book, leads: bool):
        super().__init__()
        self.book, self.leads = book, leads
        self.seen, self.rest = Store(), Store()

    @property
    def kv_bytes(self) -> int:
        return self.seen.bytes + self.rest.bytes

    def get_seq_length(self) -> int:
        """Columns of the sequence so far, padding and visual tokens included."""
        return self.book.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.book.length + query_length, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = (self.seen.buffers or self.rest.buffers)[0].shape[0]
        self._select(torch.arange(batch).repeat_interleave(repeats))

    def _select(self, samples: torch.Tensor) -> None:
        if self.leads:
            self.book.select(samples)
        for store in (self.seen, self.rest):
            store.map(lambda t: t.index_select(0, samples.to(t.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns (a positive value, the older form, is the length to keep)."""
        tokens_to_remove = int(tokens_to_remove)  # a 0-d tensor where drafts are rejected
        if self.leads:
            length = self.book.length
            self.book.crop(-tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0))
        seen, rest = self.book.stored
        self.seen.crop(seen)
        self.rest.crop(rest)

    def reset(self) -> None:
        if self.leads:
            self.book.__init__(len(self.book.slots.sample), self.book.plan)
        self.seen, self.rest = Store(), Store()
