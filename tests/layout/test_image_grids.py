"""Grids of images by hand; `tests/cost/test_shapes.py` holds them against transformers' processors."""

import pytest

from vis_sparse.layout.image_grids import ShapeError, smart_resize

UNIT = 28


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 150), (4, 5)),  # 3.6 x 5.4: the nearest
        ((1000, 1500), (8, 12)),  # 100 units hold 8.2 x 12.2: rounded down, so that they do
        ((20, 30), (4, 5)),  # 16 units are 3.3 x 4.9: rounded up
        ((20, 3900), (1, 139)),  # 0.7 x 139: a side is one unit at least, as in transformers
    ],
)
def test_sides_keep_the_pixels_within_bounds(size, expected):
    assert smart_resize(*size, UNIT, 16 * UNIT**2, 100 * UNIT**2) == expected


def test_images_too_narrow_are_refused():
    with pytest.raises(ShapeError, match="got 2010 x 10 pixels, expected an aspect ratio of at most 200"):
        smart_resize(10, 2010, UNIT, 16 * UNIT**2, 100 * UNIT**2)
