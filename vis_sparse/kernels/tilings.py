"""How a grid is cut for the kernels of neighbourhoods: tiles, and the steps in which a tile's box is walked.

The arithmetic is that of `triton_boxes.py`, on arrays; here it counts what each choice of sides would walk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..plans.layer_plan import Neighborhood
from .patterns import window

# A core must spare the masks of this share of the steps to be worth a loop of its own.
_CORE_SHARE = 0.1


@dataclass(frozen=True)
class Tiling:
    """tile, step: height and width. has_core: whether enough steps need no mask. entries: for each tile, in the order
    of `tables.grid_tiles`, of its box and the text before it. walked: of all tiles, steps counted whole."""

    tile: tuple[int, int]
    step: tuple[int, int]
    has_core: bool
    entries: np.ndarray
    walked: int

    @property
    def sides(self) -> tuple[int, int, int, int, int]:
        """As the operators take it."""
        return *self.tile, *self.step, int(self.has_core)


def best_tiling(
    near: Neighborhood, segments: np.ndarray, runs: np.ndarray, positions: int, entries: int, of_keys: bool = False
) -> Tiling:
    """The sides, powers of two, of tiles of `positions` and steps of `entries` that walk the least; square tiles first.

    segments, runs: as in `tables.NearTables`. of_keys: tiles of keys, and boxes of queries, without text.
    """
    text = [0 if of_keys else int(runs[low:high, 1].sum()) for low, high in segments[:, 6:8]]
    grids = [(*map(int, segment[3:6]), before) for segment, before in zip(segments, text)]
    found = (_tiling(near, grids, tile, step, of_keys) for tile in _shapes(positions) for step in _shapes(entries))
    return min(found, key=lambda t: (t.walked, t.entries.sum(), abs(t.tile[0] - t.tile[1])))


def _shapes(area: int) -> list[tuple[int, int]]:
    return [(1 << i, area >> i) for i in range(area.bit_length())]


def _tiling(near: Neighborhood, grids, tile, step, of_keys: bool) -> Tiling:
    sizes, walked, inner, steps, known = [], 0, 0, 0, {}
    in_frame = near.direction == "causal"
    for grid in grids:
        if grid not in known:
            frames, height, width, text = grid
            t = np.arange(frames)
            behind, before = np.minimum(near.frames, frames - 1 - t), np.minimum(near.frames, t)
            depth = 1 + (0 if in_frame and not of_keys else behind) + (0 if in_frame and of_keys else before)
            rows, row_steps, core_rows = _axis(near, height, tile[0], step[0], of_keys, in_frame)
            columns, column_steps, core_columns = _axis(near, width, tile[1], step[1], of_keys, False)
            entries = (depth[:, None, None] * rows[:, None] * columns).ravel() + text
            tiles, frames_read = len(rows) * len(columns), int(depth.sum())
            known[grid] = (
                entries,
                frames * tiles * text,
                frames_read * int(core_rows.sum()) * int(core_columns.sum()),
                frames_read * int(row_steps.sum()) * int(column_steps.sum()),
            )
        entries, texts, core_steps, all_steps = known[grid]
        sizes.append(entries)
        walked += texts + all_steps * step[0] * step[1]
        inner, steps = inner + core_steps, steps + all_steps
    entries = np.concatenate([np.zeros(0, dtype=np.int64), *sizes])
    return Tiling(tile, step, inner >= max(_CORE_SHARE * steps, 1), entries, tile[0] * tile[1] * walked)


def _axis(near: Neighborhood, side: int, tile: int, step: int, of_keys: bool, in_frame: bool):
    """On one axis, for each tile: entries of its box, steps, and steps in the core. in_frame: the axis along which
    causality cuts the box."""
    first = np.arange(0, side, tile)
    last = np.minimum(first + tile, side) - 1
    if of_keys:
        low, core_low = (np.maximum(end - near.radius, 0) // near.stride * near.stride for end in (first, last))
        high, core_high = ((end + near.radius) // near.stride * near.stride + near.stride - 1 for end in (last, first))
    else:
        (low, core_high), (core_low, high) = window(near, first, side), window(near, last, side)
        low, core_low = np.maximum(low, 0), np.maximum(core_low, 0)
    high, core_high = np.minimum(high, side - 1), np.minimum(core_high, side - 1)
    if in_frame and of_keys:
        core_low, low = np.maximum(core_low, last + 1), np.maximum(low, first) if near.frames == 0 else low
    elif in_frame:
        core_high, high = np.minimum(core_high, first - 1), np.minimum(high, last) if near.frames == 0 else high
    count = high - low + 1
    shift = (step - (core_low - low) % step) % step
    shift = np.where((shift <= low) & (-(-(count + shift) // step) == -(-count // step)), shift, 0)
    begin = low - shift
    inner = (core_high + 1 - begin) // step + -(core_low - begin) // step
    return count, -(-(count + shift) // step), np.maximum(inner, 0)
