"""Packing: rows and slots of a call by hand."""

import numpy as np
import pytest

from vis_sparse.layout.layout import LayoutError, VisualLayout
from vis_sparse.layout.packing import pack, places_of

TWO = VisualLayout.from_grids([[(1, (1, 2, 2))], [(0, (1, 1, 1))]])


def test_text_rows_are_padded_on_the_left():
    packing = pack(TWO, 6)
    assert packing.text_columns.tolist() == [[0, 0, 0, 0, 5], [1, 2, 3, 4, 5]]
    assert packing.text_valid.tolist() == [[False, False, False, True, True], [True] * 5]
    assert packing.visual_slots.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert packing.visual_valid.tolist() == [[True] * 4, [False, False, False, True]]
    assert packing.row_index().tolist() == [0, 0, 0, 0, 5, 7, 8, 9, 10, 11, 1, 2, 3, 4, 6]


def test_rows_of_a_chunk_are_its_own_and_slots_those_of_the_sequence():
    packing = pack(VisualLayout.from_grids([[(4, (1, 1, 2))]]), 4, past=3)
    assert packing.text_columns.tolist() == [[0, 3]] and packing.row_index().tolist() == [0, 3, 1, 2]
    slots = packing.slots()
    assert slots.column.tolist() == [[4, 5, 3, 6]] and slots.is_visual.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("hidden", [1, 4])
def test_visual_tokens_are_no_padding(hidden):
    mask = np.ones((2, 6), dtype=bool)
    mask[0, hidden] = False
    with pytest.raises(LayoutError, match=r"attention_mask: got 0 at visual tokens, expected 1"):
        pack(TWO, 6, mask=mask)


def test_the_mask_is_not_written_to():
    mask = np.ones((2, 6), dtype=bool)
    mask[:, 5] = False
    given = mask.copy()
    assert pack(TWO, 6, mask=mask).text_valid.sum() == 1 + 4 and np.array_equal(mask, given)


def test_places_are_counted_over_real_tokens():
    mask = np.ones((2, 6), dtype=bool)
    mask[0, 0] = mask[1, 2] = False
    packing = pack(TWO, 6, mask=mask)
    assert places_of(packing.slots(), 6).tolist() == [[0, 0, 1, 2, 3, 4], [0, 1, 1, 2, 3, 4]]
    assert [s.start for s in packing.layout_without_padding().segments] == [0, 0]


def test_rows_that_left_leave_no_slots():
    kept = pack(TWO, 6).keep(np.array([1, 3]))
    assert kept.visual_slots.tolist() == [[0, 1], [0, 0]] and not kept.visual_valid[1].any()
    assert kept.slots().column[0, :2].tolist() == [2, 4]
