"""Decoders that `read_decoder` refuses by their settings."""

import pytest

import vis_sparse

from ..models import make_model


def test_attention_dropout():
    model = make_model(attention_dropout=0.1)
    with pytest.raises(vis_sparse.PatchError, match="attention_dropout=0.1, expected 0"):
        vis_sparse.patch(model)
    assert vis_sparse.inspect(model) is None
