"""What others see of a patched model's cache: its methods, and a line that says what lies there instead of tensors."""

import pytest
import torch
from transformers import DynamicCache

import vis_sparse

from ..models import IMAGE, make_batch, make_model, random_plan


@torch.no_grad()
def test_tensors_are_not_where_plain_caches_have_them():
    model = vis_sparse.patch(make_model(), random_plan(3))
    batch = make_batch(model, [(3, IMAGE, 4)])
    cache = DynamicCache()
    model(**batch.by_ids(), past_key_values=cache)
    assert cache.get_seq_length() == batch.length
    for look in (lambda: cache.layers[0].keys, lambda: cache.layers[1].values, lambda: list(cache)):
        with pytest.raises(AttributeError, match="this cache layer holds lanes of a model patched by vis_sparse"):
            look()
    with pytest.raises(NotImplementedError, match="offload: got a cache layer that holds lanes"):
        cache.layers[0].offload()
    assert not hasattr(cache.layers[0], "keys")
