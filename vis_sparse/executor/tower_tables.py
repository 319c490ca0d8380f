"""The index tables of one call of a vision encoder: which rows are an image's, who is whose neighbour, who reads whom.

Rows of a call are brought into one order: global tokens (class tokens) first, then the patches, image after image (or,
where the model has windows of its own, window after window) in raster order, packed: ragged images cost no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..kernels import Backend
from ..kernels.patterns import TextPattern, VisualPattern
from ..layout.packing import Coordinates, on_device, text_coordinates
from ..plans.layer_plan import Neighborhood, TokenBudget
from .token_scores import received_by_all, wide
from .tokens import choose


class TowerRows(NamedTuple):
    """Where the rows of an encoder's call lie, (rows,) each, in the model's own order.

    sequence: the image or frame that a row is of, within which rows attend. y, x: place of a patch in it; -1: a global
    token. window: within which rows attend in layers that have windows; None without any. Windows and global tokens
    do not come together.
    """

    sequence: np.ndarray
    y: np.ndarray
    x: np.ndarray
    window: np.ndarray | None = None


class _Parts(NamedTuple):
    """What rows attend within: for each patch its part, its place there, and the part's height and width."""

    part: np.ndarray
    y: np.ndarray
    x: np.ndarray
    height: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, part: np.ndarray, y: np.ndarray, x: np.ndarray) -> _Parts:
        _, part = np.unique(part, return_inverse=True)
        sides = []
        for place in (y, x):
            first, last = np.full(part.max(initial=-1) + 1, np.iinfo(np.int64).max), np.zeros(part.max(initial=-1) + 1)
            np.minimum.at(first, part, place)
            np.maximum.at(last, part, place)
            sides.append((place - first[part], (last - first + 1).astype(np.int64)[part]))
        (y, height), (x, width) = sides
        return cls(part, y, x, height, width)

    def take(self, index) -> _Parts:
        return _Parts(*(array[index] for array in self))


class TowerTables:
    """The tables of a call, or of the layers of it that only some patches reach.

    num_rows: of the call, in the model's order. index: (rows,) row of that order of every row here; None if they are
    the same.
    """

    def __init__(
        self,
        order: np.ndarray,
        num_rows: int,
        num_globals: int,
        sequence: np.ndarray,
        parts: dict[bool, _Parts],
        device: torch.device,
    ):
        """order: (rows,) row of the model's order. sequence: (rows,) number of the image. parts: of patches, without
        windows and with them."""
        self.num_rows, self.num_globals, self.device = num_rows, num_globals, device
        self._order, self._sequence, self._parts = order, sequence, parts
        self._derived: dict = {}

    @classmethod
    def of(cls, rows: TowerRows, device: torch.device) -> TowerTables:
        """The tables of a whole call."""
        is_patch = rows.y >= 0
        num_globals = int((~is_patch).sum())
        order = np.lexsort((rows.x, rows.y, rows.sequence if rows.window is None else rows.window, is_patch))
        patches = order[num_globals:]
        place = rows.y[patches], rows.x[patches]
        whole = _Parts.of(rows.sequence[patches], *place)
        windows = whole if rows.window is None else _Parts.of(rows.window[patches], *place)
        sequence = np.unique(rows.sequence[order], return_inverse=True)[1]
        return cls(order, len(order), num_globals, sequence, {False: whole, True: windows}, device)

    @property
    def index(self) -> torch.Tensor | None:
        return self._kept("index", self._make_index)

    def _make_index(self) -> torch.Tensor | None:
        if np.array_equal(self._order, np.arange(self.num_rows)):
            return None
        return on_device(self._order, self.device)

    @property
    def back(self) -> torch.Tensor | None:
        """(rows of the call,) row here of every row of the model's order, where all are here; None if some left."""
        complete = len(self._order) == self.num_rows
        return self._kept("back", lambda: on_device(np.argsort(self._order), self.device)) if complete else None

    def _kept(self, key, build: Callable):
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]

    def keep(self, budget: TokenBudget, layer: int, scores: np.ndarray | None) -> TowerTables:
        """The tables of the layers behind one after which `budget` lets patches leave, the same share of every image.

        scores: (patches,), the higher the sooner one stays, for orders that have them.
        """
        if scores is not None:
            return self._keep(budget, layer, scores)
        return self._kept((budget, layer), lambda: self._keep(budget, layer, None))

    def _keep(self, budget: TokenBudget, layer: int, scores: np.ndarray | None) -> TowerTables:
        order, patches = self._raster(False), self._coordinates(self._parts[False])
        chosen = choose(budget, layer, patches.take(order), None if scores is None else scores[order])
        return self._of_patches(np.sort(order[chosen]))

    def only(self, rows: np.ndarray) -> TowerTables:
        """The tables of a call in which of all patches only those at `rows` of the model's order are run."""
        return self._of_patches(np.flatnonzero(np.isin(self._order[self.num_globals :], rows)))

    def _of_patches(self, kept: np.ndarray) -> TowerTables:
        rows = np.concatenate([np.arange(self.num_globals), self.num_globals + kept])
        parts = {windowed: each.take(kept) for windowed, each in self._parts.items()}
        left = self._order[rows], self.num_rows, self.num_globals, self._sequence[rows], parts, self.device
        return TowerTables(*left)

    def _raster(self, windowed: bool) -> np.ndarray:
        """The patches part after part, each in raster order."""
        parts = self._parts[windowed]
        return np.lexsort((parts.x, parts.y, parts.part))

    @staticmethod
    def _coordinates(parts: _Parts) -> Coordinates:
        zero = np.zeros_like(parts.part)
        return Coordinates(parts.part, zero, parts.part, zero, *parts[1:], np.ones(len(zero), dtype=bool))

    def attend_all(self, query, key, value, windowed: bool, backend: Backend, scale: float, only_globals=False):
        """Every row over all rows of its part; (rows, heads, head_dim) each. only_globals: queries are their rows."""
        outs = []
        groups, back = self._kept(("all", windowed), lambda: self._groups(windowed))
        for index, globals_, pattern, of_globals in groups:
            keys, values = (_by_group(rows, index) for rows in (key, value))
            if only_globals:
                outs.append(backend.text_attention(query[globals_], keys, values, of_globals, scale).flatten(0, 1))
            else:
                queries = _by_group(query, index)
                outs.append(backend.text_attention(queries, keys, values, pattern, scale).flatten(0, 1))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        if only_globals:
            order = torch.cat([globals_.flatten() for _, globals_, _, _ in groups])
            return torch.empty_like(out).index_copy(0, order, out)
        return out if back is None else out.index_select(0, back)

    def _groups(self, windowed: bool):
        """Parts of one size each: their rows (parts, size), those of global tokens, and the patterns of both; and where
        the rows are in the groups' outputs, one after the other, None if that is their order."""
        part = self._sequence if self.num_globals else self._parts[windowed].part
        groups, places = [], []
        for index in _of_equal_size(part):
            each = int((index[0] < self.num_globals).sum())  # a part's global tokens come first
            patterns = (self._reads_all(len(index), queries, index.shape[1]) for queries in (index.shape[1], each))
            places.append(index.ravel())
            groups.append((on_device(index, self.device), on_device(index[:, :each], self.device), *patterns))
        back = self._inverse(np.concatenate(places))
        if back is None and len(groups) == 1:  # views will do
            groups = [(tuple(groups[0][0].shape), *groups[0][1:])]
        return groups, back

    def received(self, query, key, windowed: bool, scale: float) -> torch.Tensor:
        """The attention that each row gets within its part, (rows of the call,) in the model's order: from global
        tokens where there are any, else from all. query, key (rows, heads, head_dim). Of rows that left it is 0."""
        found = query.new_zeros(self.num_rows, dtype=wide(query.dtype))
        order = on_device(self._order, self.device)
        for index, globals_, _, _ in self._kept(("all", windowed), lambda: self._groups(windowed))[0]:
            asking = globals_ if globals_.shape[1] else index
            received = received_by_all(_by_group(query, asking), _by_group(key, index), scale)
            place = order if isinstance(index, tuple) else order[index.flatten()]
            found = found.index_copy(0, place, received.flatten())
        return found

    def _reads_all(self, parts: int, queries: int, keys: int) -> TextPattern:
        column = np.broadcast_to(np.arange(keys), (parts, keys))
        sample = np.broadcast_to(np.arange(parts)[:, None], column.shape)
        slots = text_coordinates(sample, column, np.ones(column.shape, dtype=bool))
        return TextPattern(np.full((parts, queries), keys), slots, None, self.device)

    def attend_globals(self, query, key, value, backend: Backend, scale: float):
        """Global tokens over those of their image alone."""
        parts = len(np.unique(self._sequence[: self.num_globals]))
        each = self.num_globals // parts
        pattern = self._kept("globals", lambda: self._reads_all(parts, each, each))
        rows = (rows.unflatten(0, (parts, each)) for rows in (query, key, value))
        return backend.text_attention(*rows, pattern, scale).flatten(0, 1)

    def attend_near(
        self, query, key, value, near: Neighborhood, windowed: bool, backend: Backend, scale: float
    ) -> torch.Tensor:
        """Patches over their neighbours and the global tokens of their image.

        query (patches, heads, head_dim); key, value (rows, heads, head_dim).
        """
        if near.radius == 0:
            return self._attend_blocks(query, key, value, near.stride, windowed, backend, scale)
        order, back, slots, pattern = self._kept((near, windowed), lambda: self._near(near, windowed))
        query = query if order is None else query.index_select(0, order)
        key, value = (_by_group(rows, slots) for rows in (key, value))
        out = backend.visual_attention(query, key, value, pattern, scale)
        return out if back is None else out.index_select(0, back)

    def _attend_blocks(self, query, key, value, stride: int, windowed: bool, backend: Backend, scale: float):
        """Aligned windows that do not overlap: each attends to itself, and nothing has to be masked."""
        groups, back = self._kept(("blocks", stride, windowed), lambda: self._blocks(stride, windowed))
        outs = []
        for queries, keys, pattern in groups:
            rows = _by_group(query, queries), _by_group(key, keys), _by_group(value, keys)
            outs.append(backend.text_attention(*rows, pattern, scale).flatten(0, 1))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out if back is None else out.index_select(0, back)

    def _blocks(self, stride: int, windowed: bool):
        """As `_groups`, of aligned windows: their patches, and these with the global tokens of their image."""
        parts = self._parts[windowed]
        _, block = np.unique([parts.part, parts.y // stride, parts.x // stride], axis=1, return_inverse=True)
        groups, places = [], []
        for index in _of_equal_size(block.ravel()):
            own = parts.part[index[:, 0]]
            globals_ = np.stack([np.flatnonzero(self._sequence[: self.num_globals] == part) for part in own])
            keys = np.concatenate([globals_, self.num_globals + index], axis=1)
            pattern = self._reads_all(len(index), index.shape[1], keys.shape[1])
            places.append(index.ravel())
            groups.append((*(on_device(each, self.device) for each in (index, keys)), pattern))
        return groups, self._inverse(np.concatenate(places))

    def _inverse(self, places: np.ndarray) -> torch.Tensor | None:
        """Where each row is among outputs that come in the order of `places`; None if that is its own place."""
        return None if np.array_equal(places, np.arange(len(places))) else on_device(np.argsort(places), self.device)

    def _near(self, near: Neighborhood, windowed: bool):
        parts, order = self._parts[windowed], self._raster(windowed)
        patches = self._coordinates(parts).take(order)
        column = np.arange(len(order))
        if not self.num_globals:
            # without text between them all parts are segments of one sample: nothing is padded
            patches = patches._replace(sample=np.zeros_like(order), column=column)
            slots, index = patches.take(np.s_[None]), order[None]
        else:
            samples = int(self._sequence.max()) + 1
            column = column + self.num_globals
            of_globals = self._sequence[: self.num_globals]
            text = text_coordinates(of_globals, np.arange(self.num_globals), np.ones(self.num_globals, dtype=bool))
            patches = patches._replace(column=column)
            rows = Coordinates(*(np.concatenate(pair) for pair in zip(text, patches)))
            place = np.concatenate([np.arange(self.num_globals), self.num_globals + order])
            slots, index = _padded(rows, place, samples)
        pattern = VisualPattern(near, patches, slots, self.device)
        in_order = np.array_equal(order, np.arange(len(order)))
        whole = np.array_equal(index.ravel(), np.arange(self.num_globals + len(order)))
        slots = tuple(index.shape) if whole else on_device(index, self.device)
        if in_order:
            return None, None, slots, pattern
        return on_device(order, self.device), on_device(np.argsort(order), self.device), slots, pattern


def _of_equal_size(part: np.ndarray) -> list[np.ndarray]:
    """The members of all parts, (parts, size) for each size that there is."""
    order, sizes = np.argsort(part, kind="stable"), np.bincount(part)
    starts = np.cumsum(sizes) - sizes
    return [order[starts[sizes == size][:, None] + np.arange(size)] for size in np.unique(sizes[sizes > 0])]


def _padded(rows: Coordinates, place: np.ndarray, samples: int) -> tuple[Coordinates, np.ndarray]:
    """Slots (samples, slots) of rows, those of shorter samples padded at the end, and the place of each."""
    sizes = np.bincount(rows.sample, minlength=samples)
    order = np.argsort(rows.sample, kind="stable")
    valid = np.arange(sizes.max()) < sizes[:, None]
    index = np.zeros(valid.shape, dtype=np.int64)
    index[valid] = order
    return rows.take(index)._replace(valid=valid), np.where(valid, place[index], 0)


def _by_group(rows: torch.Tensor, index: torch.Tensor | tuple[int, int]) -> torch.Tensor:
    """Rows at an index of two dimensions; its shape where it is all of them in order."""
    if isinstance(index, torch.Tensor):
        return rows.index_select(0, index.flatten()).unflatten(0, index.shape)
    return rows.unflatten(0, index)
