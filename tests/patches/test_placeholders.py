"""Placeholders and the features that take their places."""

import pytest
import torch

import vis_sparse
from vis_sparse.patches import read_layout

from ..models import IMAGE, IMAGE_TOKEN, make_batch, make_model


def test_tokens_of_a_grid_lie_in_a_row():
    model = make_model()
    pixels = make_batch(model, [(3, IMAGE, 4)]).pixel_values
    half = [IMAGE_TOKEN] * 8
    apart = torch.tensor([[1, 2, *half, 3, *half, 4]])
    with pytest.raises(vis_sparse.LayoutError, match="got 16 image tokens between columns 2 and 18, expected a grid"):
        read_layout(model, dict(input_ids=apart, pixel_values=pixels))
    together = torch.tensor([[1, 2, *half, *half, 3, 4]])
    layout = read_layout(model, dict(input_ids=together, pixel_values=pixels))
    assert [(s.start, s.end) for s in layout.segments] == [(2, 18)]


@torch.no_grad()
def test_features_as_a_tuple():
    model = make_model()
    pixels = make_batch(model, [(3, IMAGE, 4)]).pixel_values
    expected = model.model.get_image_features(pixel_values=pixels, return_dict=False)
    vis_sparse.patch(model)
    found = model.model.get_image_features(pixel_values=pixels, return_dict=False)
    assert type(found) is type(expected) is tuple and len(found) == len(expected)
    for one, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, other)
