"""A shape and a layout small enough to count by hand, and pairs counted so."""

from vis_sparse.cost.shapes import ModelShape
from vis_sparse.layout.layout import VisualLayout

SMALL = ModelShape("small", layers=4, hidden=24, heads=6, kv_heads=3, head_dim=8, ffn=40, vocab=50)
# two samples: two images and a clip with text between them; an image first of all
LAYOUT = VisualLayout.from_grids([[(2, (1, 2, 3)), (8, (1, 1, 2)), (11, (2, 2, 2))], [(0, (1, 3, 2))]])
TEXT = 5  # text tokens of each sample


def brute_pairs(near, frames, height, width):
    """Query-key pairs by walking the grid, from the definition in words."""
    places = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
    count = 0
    for index, (t, y, x) in enumerate(places):
        top, left = y - y % near.stride, x - x % near.stride
        block = [(top + i, left + j) for i in range(near.stride) for j in range(near.stride)]
        for key, (kt, ky, kx) in enumerate(places):
            close = abs(kt - t) <= near.frames and any(max(abs(ky - b), abs(kx - a)) <= near.radius for b, a in block)
            count += close and (near.direction == "both" or key <= index)
    return count
