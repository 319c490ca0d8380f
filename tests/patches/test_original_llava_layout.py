"""The layout of a call of the original `llava` package, by hand; `test_original_llava` runs the package."""

from types import SimpleNamespace

import pytest
import torch

from vis_sparse.layout.layout import LayoutError, VisualLayout
from vis_sparse.patches.original_llava import _layout

IMAGE, BASE = -200, (1, 4, 4)


def layout_of(samples, tiles, sizes=None, **settings) -> VisualLayout:
    """samples: lists of ids; tiles: of each image, of 16 x 16 pixels; sizes: of the images, (width, height)."""
    config = dict(mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=[[32, 16], [16, 32], [32, 32]]) | settings
    tower = SimpleNamespace(num_patches_per_side=4, config=SimpleNamespace(image_size=16), select_feature="patch")
    outer = SimpleNamespace(config=SimpleNamespace(**config), get_vision_tower=lambda: tower)
    length = max(map(len, samples))
    ids = torch.tensor([sample + [0] * (length - len(sample)) for sample in samples])
    mask = torch.tensor([[1] * len(sample) + [0] * (length - len(sample)) for sample in samples])
    return _layout(outer, ids, mask, [torch.zeros(count, 3, 16, 16) for count in tiles], sizes)


def test_a_sample_without_an_image_uses_one_up():
    tiles, sizes = (1, 5), [(16, 16), (30, 20)]
    expected = VisualLayout.from_grids([[], [(1, BASE), (17, (1, 6, 9))]])
    assert layout_of([[5, 6, 7], [5, IMAGE, 7]], tiles, sizes) == expected


def test_padding_on_the_left_moves_the_shorter_sample():
    samples, tiles, sizes = [[5, IMAGE, 7], [5, 6, 7, IMAGE, 8]], (1, 1), [(16, 16)] * 2
    starts = [[s.start for s in layout_of(samples, tiles, sizes).segments]]
    starts += [[s.start for s in layout_of(samples, tiles, sizes, tokenizer_padding_side="left").segments]]
    assert starts == [[1, 17, 3, 19], [3, 19, 3, 19]]


def test_a_limit_within_an_image_is_refused_and_one_before_it_leaves_it_out():
    one = ([[5, 6, IMAGE, 7]], (1,), [(16, 16)])
    with pytest.raises(LayoutError, match="tokenizer_model_max_length: got 10, which cuts the image at 2"):
        layout_of(*one, tokenizer_model_max_length=10)
    assert layout_of(*one, tokenizer_model_max_length=2).segments == ()
    assert [s.start for s in layout_of(*one, tokenizer_model_max_length=19).segments] == [2, 18]
