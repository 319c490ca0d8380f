"""Layouts: where segments may lie, and what happens to them when a batch is cut, moved or repeated."""

import re

import pytest

from vis_sparse.layout.layout import LayoutError, Segment, VisualLayout

LAYOUT = VisualLayout.from_grids([[(2, (1, 2, 3)), (9, (2, 1, 2))], [], [(0, (1, 1, 1))]])


def test_from_grids_orders_and_sizes():
    assert VisualLayout.from_grids([[(9, (2, 1, 2)), (2, (1, 2, 3))], [], [(0, (1, 1, 1))]]) == LAYOUT
    assert LAYOUT.segments == (Segment(0, 2, 1, 2, 3), Segment(0, 9, 2, 1, 2), Segment(2, 0, 1, 1, 1))
    assert [(s.size, s.end) for s in LAYOUT.segments] == [(6, 8), (4, 13), (1, 1)]
    assert (LAYOUT.batch_size, LAYOUT.num_visual) == (3, 11)
    assert hash(LAYOUT) == hash(VisualLayout(3, list(LAYOUT.segments)))


@pytest.mark.parametrize(
    ("batch_size", "segments", "message"),
    [
        (1, [Segment(1, 0, 1, 1, 1)], "segment: got sample 1, expected 0 to 0"),
        (1, [Segment(-1, 0, 1, 1, 1)], "segment: got sample -1, expected 0 to 0"),
        (1, [Segment(0, -1, 1, 1, 1)], "expected a start >= 0 and a grid of sides >= 1"),
        (1, [Segment(0, 0, 1, 0, 4)], "expected a start >= 0 and a grid of sides >= 1"),
        (2, [Segment(1, 0, 1, 1, 1), Segment(0, 0, 1, 1, 1)], "segments: expected order by sample and position"),
        (
            1,
            [Segment(0, 4, 1, 2, 2), Segment(0, 7, 1, 1, 1)],
            "segments: sample 0: got positions 7 to 7, expected a start at or after 8 (segments must not overlap)",
        ),
        (1, [Segment(0, 4, 1, 2, 2), Segment(0, 1, 1, 1, 1)], "expected a start at or after 8"),
    ],
)
def test_what_is_refused(batch_size, segments, message):
    with pytest.raises(LayoutError, match=re.escape(message)):
        VisualLayout(batch_size, segments)


def test_segments_may_touch_and_samples_may_repeat_positions():
    touching = VisualLayout(2, [Segment(0, 4, 1, 2, 2), Segment(0, 8, 1, 1, 1), Segment(1, 4, 1, 1, 1)])
    assert touching.num_visual == 6


@pytest.mark.parametrize(
    ("start", "end", "kept"), [(0, 20, 3), (0, 8, 2), (0, 2, 1), (1, 9, 1), (8, 9, 0), (9, 13, 1), (13, 99, 0)]
)
def test_a_window_keeps_the_segments_inside_with_their_positions(start, end, kept):
    window = LAYOUT.window(start, end)
    assert len(window.segments) == kept
    assert set(window.segments) <= set(LAYOUT.segments)
    assert window.batch_size == 3


@pytest.mark.parametrize(("start", "end"), [(0, 3), (0, 7), (7, 20), (3, 5)])
def test_a_chunk_that_cuts_a_segment_is_refused(start, end):
    message = (
        f"prefill chunk: got positions {start} to {end - 1}, which cut the 1x2x3 visual segment at 2 to 7 of sample 0"
    )
    with pytest.raises(LayoutError, match=f"^{re.escape(message)}; expected chunks that end outside visual segments$"):
        LAYOUT.window(start, end)


def test_shifted_moves_every_position():
    moved = LAYOUT.shifted(5)
    assert [s.start for s in moved.segments] == [7, 14, 5]
    assert moved.shifted(-5) == LAYOUT
    with pytest.raises(LayoutError, match="start >= 0"):
        LAYOUT.shifted(-1)


def test_expanded_repeats_each_sample_in_place():
    wide = LAYOUT.expanded(6)
    assert [(s.sample, s.start) for s in wide.segments] == [(0, 2), (0, 9), (1, 2), (1, 9), (4, 0), (5, 0)]
    assert LAYOUT.expanded(3) == LAYOUT
    with pytest.raises(LayoutError, match="^layout: got a batch of 4, expected a multiple of 3$"):
        LAYOUT.expanded(4)
