"""Which keys a visual query reads: one rule, and the tiles in which the rule is applied.

The rule (`visible`) is evaluated on coordinates. The reference backend evaluates it for all pairs; the tiled backend
cuts every grid into tiles, gives each tile the keys that its halo touches, and evaluates it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..layout.packing import Coordinates, on_device
from ..plans.layer_plan import Neighborhood

# Cost of fetching one key row in units of one query-key pair: a row of K and V is copied (16 bytes a head_dim
# element in fp32) where a pair costs 4 FLOPs a head_dim element.
_FETCH = 24
# Pairs of one head that must be saved to be worth another call of the attention.
_CALL = 2**15
_TILE_SIDES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def visible(attention: str | Neighborhood, query: Coordinates, key: Coordinates) -> np.ndarray:
    """Whether visual queries read keys, for coordinates that broadcast against each other (DESIGN.md section 3)."""
    before = key.column <= query.column
    if isinstance(attention, Neighborhood):
        near = (key.segment == query.segment) & (np.abs(key.frame - query.frame) <= attention.frames)
        for axis, side in (("y", query.height), ("x", query.width)):
            low, high = window(attention, getattr(query, axis), side)
            near &= (getattr(key, axis) >= low) & (getattr(key, axis) <= high)
        visual = near & before if attention.direction == "causal" else near
    else:
        visual = before
    return (key.sample == query.sample) & key.valid & np.where(key.is_visual, visual, before)


def window(near: Neighborhood, position, side):
    """First and last coordinate of the window of a query at `position`; a block of `stride` queries shares it."""
    first = position // near.stride * near.stride
    last = np.minimum(first + near.stride - 1, side - 1)
    return first - near.radius, last + near.radius


class Mask:
    """Which keys are read, kept in the forms that backends want. allowed: bool tensor, True = read."""

    def __init__(self, allowed: torch.Tensor):
        self.allowed = allowed
        self._bias: dict[torch.dtype, torch.Tensor] = {}

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """0 where read, -inf elsewhere: what scaled_dot_product_attention adds without converting it in every call."""
        if dtype not in self._bias:
            with torch.inference_mode(False):
                zeros = torch.zeros(self.allowed.shape, dtype=dtype, device=self.allowed.device)
                self._bias[dtype] = zeros.masked_fill_(~self.allowed, float("-inf"))
        return self._bias[dtype]


class _Pattern:
    """Tables that a backend derives from a pattern are kept with it, and so for as long as its layout repeats."""

    def derive(self, build: Callable, *settings):
        """`build(self, *settings)`, built once."""
        derived = self.__dict__.setdefault("_derived", {})
        if (build, settings) not in derived:
            derived[build, settings] = build(self, *settings)
        return derived[build, settings]


class TextPattern(_Pattern):
    """What the text queries of one call read: keys at or before them, visual ones not in blind heads.

    query_columns: (batch, Q) column of the sequence of each query. slots: coordinates of the keys, (batch, S).
    blind: for each query head, whether it must not read visual keys; None if all may. general: whether tables take the
    form that fits other columns and slots of these shapes too. unblind: the same without blind heads; None: this one.
    """

    def __init__(
        self,
        query_columns: np.ndarray,
        slots: Coordinates,
        blind: tuple[bool, ...] | None,
        device: torch.device,
        general: bool = False,
        unblind: TextPattern | None = None,
    ):
        self.query_columns, self.slots, self.blind, self.device = query_columns, slots, blind, device
        self.general, self._unblind = general, unblind

    @property
    def unblind(self) -> TextPattern:
        """Whose tables are shared, where they do not know of heads."""
        return self if self._unblind is None else self._unblind

    @cached_property
    def is_causal(self) -> bool:
        """Whether queries and keys are the same tokens in the same order, so that plain causal attention does."""
        if self.general:
            return False
        same = np.array_equal(self.query_columns, self.slots.column)
        return same and self.query_columns.shape[1] > 1 and self.blind is None and bool(self.slots.valid.all())

    @cached_property
    def is_visual(self) -> torch.Tensor:
        """(batch, S) bool: the slots of visual tokens."""
        return on_device(self.slots.is_visual & self.slots.valid, self.device)

    @cached_property
    def mask(self) -> Mask | None:
        """(batch, 1 or heads, Q, S); None if every query reads every key."""
        if not self.query_columns.size:
            return None
        seen = self.slots.valid & (self.slots.column <= self.query_columns.min(1, keepdims=True))
        if self.blind is None and seen.all() and not self.general:
            return None
        allowed = self.slots.valid[:, None] & (self.slots.column[:, None] <= self.query_columns[:, :, None])
        allowed = allowed[:, None]
        if self.blind is not None:
            hidden = np.array(self.blind)[None, :, None, None] & self.slots.is_visual[:, None, None, :]
            allowed = allowed & ~hidden
        return Mask(on_device(allowed, self.device))


class StepMask(Mask):
    """A step's: nothing of it outlives the step, so it may be made in inference mode."""

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._bias:
            zero = torch.zeros((), dtype=dtype, device=self.allowed.device)
            self._bias[dtype] = torch.where(self.allowed, zero, float("-inf"))
        return self._bias[dtype]


class BlindHeads:
    """Heads that may not read visual keys in steps, kept over steps, and so is what is made of it.

    heads: (heads,) bool. is_visual: (at least as many slots as a step reads,) bool.
    """

    def __init__(self, heads: torch.Tensor, is_visual: torch.Tensor):
        self.heads, self.is_visual = heads, is_visual
        self._shown: Mask | None = None

    @property
    def shown(self) -> Mask:
        """(1, heads, 1, slots): what each head may read."""
        if self._shown is None:
            with torch.inference_mode(False):
                self._shown = Mask(~(self.heads[:, None] & self.is_visual)[None, :, None])
        return self._shown


class StepBlindHeads(BlindHeads):
    """A step's own: what is made of them does not outlive it."""

    @property
    def shown(self) -> Mask:
        return StepMask(~(self.heads[:, None] & self.is_visual)[None, :, None])


class HeadsMask:
    """What the heads of a layer read of the slots that a step reads. read: (batch or 1, 1, 1, slots), None for all."""

    def __init__(self, read: Mask | None, blind: BlindHeads, slots: int):
        self._read, self._blind, self._slots = read, blind, slots
        self._bias: dict[torch.dtype, torch.Tensor] = {}

    @property
    def allowed(self) -> torch.Tensor:
        shown = self._blind.shown.allowed[..., : self._slots]
        return shown if self._read is None else shown & self._read.allowed

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._bias:
            shown = self._blind.shown.bias(dtype)[..., : self._slots]
            self._bias[dtype] = shown if self._read is None else shown + self._read.bias(dtype)
        return self._bias[dtype]


class StepPattern:
    """What the one text query of each sample reads in a decode step, from tables on the device.

    slots: of the store, in use or not. read: (batch or 1, 1, 1, slots), None for all. last: (1,) the last slot in
    use; None: all are.
    """

    is_causal = False

    def __init__(self, slots: int, read: Mask | None, blind: BlindHeads | None, last: torch.Tensor | None = None):
        self.slots, self.read, self.blind, self.last = slots, read, blind, last
        self.mask = read if blind is None else HeadsMask(read, blind, slots)


@dataclass(frozen=True)
class TileGroup:
    """Tiles that read about as many keys.

    query: (tiles, Q) packed visual row of each query, padded with a repeated row. key: (tiles, K) index into the
    (batch * slots) key rows. mask: (tiles, 1, Q, K).
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: Mask

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head that are computed, padding and masked ones included."""
        return self.query.numel() * self.key.shape[1]


@dataclass(frozen=True)
class Tiles:
    """Index tables of the tiled backend.

    position: (num_visual,) place of each packed row in the flattened outputs of the groups, one after the other; None
    if that is the packed order itself.
    """

    groups: tuple[TileGroup, ...]
    position: torch.Tensor | None

    @property
    def pairs(self) -> int:
        return sum(group.pairs for group in self.groups)


def _on_grid(tokens: Coordinates, values: np.ndarray) -> np.ndarray:
    """One segment's values at the places of its tokens, (frames, height, width); -1 where tokens have left."""
    grid = np.full((tokens.frame.max() + 1, tokens.height[0], tokens.width[0]), -1)
    grid[tokens.frame, tokens.y, tokens.x] = values
    return grid


class VisualPattern(_Pattern):
    """What the visual queries of one call read, as tables that each backend takes in its own form.

    attention: "full" or a Neighborhood. query: coordinates of the packed visual rows. slots: coordinates of the keys,
    (batch, slots). general: whether tables take the form that fits other texts of as many slots too. Tables are built
    on first use and kept.
    """

    def __init__(
        self,
        attention: str | Neighborhood,
        query: Coordinates,
        slots: Coordinates,
        device: torch.device,
        general: bool = False,
    ):
        self.attention, self.query, self.slots, self.device = attention, query, slots, device
        self.general = general

    @cached_property
    def has_whole_grids(self) -> bool:
        """Whether no token of a segment has left."""
        _, first, counts = np.unique(self.query.segment, return_index=True, return_counts=True)
        rows = (self.query.height * self.query.width)[first]
        return bool((counts % rows == 0).all() and (self.query.frame[first + counts - 1] == counts // rows - 1).all())

    @cached_property
    def dense_mask(self) -> Mask:
        """(num_visual, batch * slots)."""
        query = self.query.take(np.s_[:, None])
        key = Coordinates(*(array.reshape(1, -1) for array in self.slots))
        return Mask(on_device(visible(self.attention, query, key), self.device))

    @cached_property
    def tiles(self) -> Tiles:
        boxes = sorted(self._boxes(), key=lambda box: -len(box[1]))
        num_queries = max(len(q) for q, _ in boxes)
        position = np.empty(len(self.query.sample), dtype=np.int64)
        for tile, (q, _) in enumerate(boxes):
            position[q] = tile * num_queries + np.arange(len(q))
        sizes = np.array([len(k) for _, k in boxes])
        groups, first = [], 0
        for tile in range(1, len(boxes) + 1):
            # a shorter box begins a new group if that spares all that are left enough padding
            ends = tile == len(boxes)
            if ends or (sizes[first] - sizes[tile]) * num_queries * (len(boxes) - tile) > _CALL:
                groups.append(self._tile_group(boxes[first:tile], num_queries))
                first = tile
        in_order = np.array_equal(position, np.arange(len(boxes) * num_queries))
        return Tiles(tuple(groups), None if in_order else on_device(position, self.device))

    def _tile_group(self, boxes, num_queries: int) -> TileGroup:
        num_keys = max(len(k) for _, k in boxes)
        query = np.zeros((len(boxes), num_queries), dtype=np.int64)
        key = np.zeros((len(boxes), num_keys), dtype=np.int64)
        real = np.zeros((len(boxes), num_keys), dtype=bool)
        for tile, (q, k) in enumerate(boxes):
            query[tile], key[tile] = q[0], k[0]
            query[tile, : len(q)], key[tile, : len(k)] = q, k
            real[tile, : len(k)] = True
        keys = Coordinates(*(array.ravel() for array in self.slots)).take(key)
        keys = keys._replace(valid=keys.valid & real).take(np.s_[:, None, :])
        mask = visible(self.attention, self.query.take(query).take(np.s_[:, :, None]), keys)
        return TileGroup(
            *(on_device(t, self.device) for t in (query, key)), Mask(on_device(mask[:, None], self.device))
        )

    def _boxes(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(packed query rows, flat key slots) of every tile."""
        samples, slots = self.slots.sample.shape
        flat = np.arange(samples * slots).reshape(samples, slots)
        if not isinstance(self.attention, Neighborhood):
            return [
                (np.flatnonzero(self.query.sample == b), flat[b][self.slots.valid[b] | self.general])
                for b in np.unique(self.query.sample)
            ]
        boxes, sides = [], self._tile_sides()
        for segment in np.unique(self.query.segment):
            rows = np.flatnonzero(self.query.segment == segment)
            first = self.query.take(rows[0])
            seen = self.slots.take(first.sample)
            text = flat[first.sample][~seen.is_visual & (self.general | self._are_before(first.sample, first.column))]
            own = flat[first.sample][seen.valid & (seen.segment == segment)]
            grids = (_on_grid(self.query.take(rows), rows), _on_grid(seen.take(own - flat[first.sample][0]), own))
            boxes += self._segment_boxes(*grids, text, sides)
        return boxes

    def _segment_boxes(self, rows, own, text, sides):
        near, (_, height, width) = self.attention, rows.shape
        causal = near.direction == "causal"
        for t in range(rows.shape[0]):
            frames = slice(max(t - near.frames, 0), t + 1 if causal else t + near.frames + 1)
            for y in range(0, height, sides[0]):
                y_end = min(y + sides[0], height)
                low, high = window(near, np.array([y, y_end - 1]), height)
                # earlier frames may be read below the query's row also under "causal"
                last = y_end if causal and near.frames == 0 else high[1] + 1
                for x in range(0, width, sides[1]):
                    x_end = min(x + sides[1], width)
                    left, right = window(near, np.array([x, x_end - 1]), width)
                    box = own[frames, max(low[0], 0) : last, max(left[0], 0) : right[1] + 1]
                    queries = rows[t, y:y_end, x:x_end]
                    if (queries >= 0).any():
                        yield queries[queries >= 0], np.concatenate([text, box[box >= 0]])

    def _are_before(self, sample: int, column: int) -> np.ndarray:
        return self.slots.valid[sample] & (self.slots.column[sample] < column)

    def _tile_sides(self) -> tuple[int, int]:
        """Height and width of the tiles, the cheapest over all segments by pairs computed and key rows fetched."""
        near = self.attention
        heads = [np.flatnonzero(self.query.segment == s)[0] for s in np.unique(self.query.segment)]
        grids = {(int(self.query.height[i]), int(self.query.width[i])) for i in heads}
        before = max(
            int((~self.slots.is_visual[b] & (self.general | self._are_before(b, self.query.column[i]))).sum())
            for i, b in ((i, self.query.sample[i]) for i in heads)
        )
        frames = near.frames + 1 if near.direction == "causal" else 2 * near.frames + 1
        rows_around = near.radius if near.direction == "causal" and not near.frames else 2 * near.radius

        def cost(sides):
            total = 0
            for height, width in grids:
                th, tw = min(sides[0], height), min(sides[1], width)
                keys = before + frames * min(th + rows_around, height) * min(tw + 2 * near.radius, width)
                total += -(-height // th) * -(-width // tw) * keys * (th * tw + _FETCH)
            return total

        longest = max(max(grid) for grid in grids)
        sides = [side for side in _TILE_SIDES if side < longest] + [longest]
        return min(((th, tw) for th in sides for tw in sides), key=cost)
