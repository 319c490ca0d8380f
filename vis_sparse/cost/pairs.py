"""How many (query, key) pairs attention reads: counted from grids and layouts, without forming a mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..layout.layout import LayoutError, Segment, VisualLayout
from ..layout.packing import Coordinates
from ..plans.layer_plan import Neighborhood


def neighborhood_pairs(near: Neighborhood, frames: int, height: int, width: int) -> int:
    """Pairs that `near` reads within one (frames, height, width) grid, windows cut off at the border.

    With a stride, the window of a block reaches `radius` beyond the block's own rows and columns. "causal" keeps the
    keys at or before the query in raster order.
    """
    ahead_t, all_t = _axis(frames, near.frames, 1)
    ahead_y, all_y = _axis(height, near.radius, near.stride)
    ahead_x, all_x = _axis(width, near.radius, near.stride)
    if near.direction == "both":
        return all_t * all_y * all_x
    # keys of earlier frames, of earlier rows of the query's frame, of its own row up to itself
    return ahead_t * all_y * all_x + frames * (ahead_y * all_x + height * (ahead_x + width))


def _axis(size: int, radius: int, stride: int) -> tuple[int, int]:
    """(pairs with the key strictly before the query, all pairs) along one axis, over all queries."""
    before = total = 0
    for index in range(size):
        block = index - index % stride
        first, last = max(block - radius, 0), min(block + stride - 1 + radius, size - 1)
        before += index - first
        total += last - first + 1
    return before, total


@dataclass(frozen=True, slots=True)
class LanePairs:
    """Pairs of a whole batch between and within the lanes, causal by position.

    text_text, text_visual (text queries, visual keys), visual_text; visual_causal: visual queries over every visual
    key of their sample at or before them.
    """

    text_text: int
    text_visual: int
    visual_text: int
    visual_causal: int


def lane_pairs(layout: VisualLayout, text_tokens: int, sizes: Sequence[int] | None = None) -> LanePairs:
    """The pairs of `layout` with `text_tokens` unpadded text tokens in each sample.

    sizes: how many tokens of each segment are left; None: all. Raises LayoutError if a segment starts after more text
    than a sample has.
    """
    text_visual = visual_text = visual_causal = 0
    sizes = [segment.size for segment in layout.segments] if sizes is None else sizes
    left = [0] * layout.batch_size
    for (segment, seen), size in zip(_with_visual_before(layout), sizes, strict=True):
        before = segment.start - seen
        if before > text_tokens:
            raise LayoutError(
                f"layout: got a segment of sample {segment.sample} after {before} text tokens, expected at most the "
                f"sample's {text_tokens}"
            )
        text_visual += size * (text_tokens - before)
        visual_text += size * before
        visual_causal += size * left[segment.sample] + size * (size + 1) // 2
        left[segment.sample] += size
    text_text = layout.batch_size * text_tokens * (text_tokens + 1) // 2
    return LanePairs(text_text, text_visual, visual_text, visual_causal)


def _with_visual_before(layout: VisualLayout) -> Iterator[tuple[Segment, int]]:
    sample, seen = None, 0
    for segment in layout.segments:
        if segment.sample != sample:
            sample, seen = segment.sample, 0
        yield segment, seen
        seen += segment.size


def near_pairs(near: Neighborhood, layout: VisualLayout) -> int:
    """Pairs that `near` reads over all segments of `layout`."""
    counted: dict[tuple[int, int, int], int] = {}
    for segment in layout.segments:
        grid = (segment.frames, segment.height, segment.width)
        if grid not in counted:
            counted[grid] = neighborhood_pairs(near, *grid)
    return sum(counted[s.frames, s.height, s.width] for s in layout.segments)


def left_pairs(near: Neighborhood, layout: VisualLayout, tokens: Coordinates) -> int:
    """Pairs that `near` reads among `tokens`, those of `layout` that are left."""
    total = 0
    for index, segment in enumerate(layout.segments):
        own = tokens.take(tokens.segment == index)
        grid = np.zeros((segment.frames, segment.height, segment.width), dtype=bool)
        grid[own.frame, own.y, own.x] = True
        total += _pairs_of(near, grid)
    return total


def _pairs_of(near: Neighborhood, grid: np.ndarray) -> int:
    """Pairs among the True places of one grid, by sums over boxes."""
    sums = np.pad(grid, ((1, 0), (1, 0), (1, 0))).cumsum(0).cumsum(1).cumsum(2)
    t, y, x = np.nonzero(grid)
    axes = ((t, near.frames, 1), (y, near.radius, near.stride), (x, near.radius, near.stride))
    windows = [_window(*axis, side) for axis, side in zip(axes, grid.shape)]

    def box(*ranges) -> int:
        """Keys from the first coordinate of each axis up to, not including, the second, over all queries."""
        total = 0
        for corner in np.ndindex(2, 2, 2):
            places = [pair[end] for pair, end in zip(ranges, corner)]
            total += (-1) ** (3 - sum(corner)) * int(sums[tuple(places)].sum())
        return total

    if near.direction == "both":
        return box(*windows)
    (first_t, _), (first_y, _), (first_x, _) = windows
    frame, row = (t, t + 1), (y, y + 1)
    return box((first_t, t), *windows[1:]) + box(frame, (first_y, y), windows[2]) + box(frame, row, (first_x, x + 1))


def _window(place: np.ndarray, radius: int, stride: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """First coordinate of each query's window along an axis, and the one behind its last."""
    block = place - place % stride
    return np.maximum(block - radius, 0), np.minimum(block + stride + radius, side)
