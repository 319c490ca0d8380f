"""How many (query, key) pairs attention reads: counted from grids and layouts, without forming a mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .layout import LayoutError, Segment, VisualLayout
from .plan import Neighborhood


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


def lane_pairs(layout: VisualLayout, text_tokens: int) -> LanePairs:
    """The pairs of `layout` with `text_tokens` unpadded text tokens in each sample.

    Raises LayoutError if a segment starts after more text than a sample has.
    """
    text_visual = visual_text = visual_causal = 0
    for segment, seen in _with_visual_before(layout):
        before = segment.start - seen
        if before > text_tokens:
            raise LayoutError(
                f"layout: got a segment of sample {segment.sample} after {before} text tokens, expected at most the "
                f"sample's {text_tokens}"
            )
        size = segment.size
        text_visual += size * (text_tokens - before)
        visual_text += size * before
        visual_causal += size * seen + size * (size + 1) // 2
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
