"""Caches that cannot hold lanes are refused by name."""

import pytest
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import vis_sparse
from vis_sparse import PatchError
from vis_sparse.executor.transformers_internals import CACHE

from ..models import IMAGE, LAYERS, make_batch, make_model, random_plan


@pytest.fixture
def model():
    return vis_sparse.patch(make_model(), random_plan(3))


@pytest.fixture
def batch(model):
    return make_batch(model, [(3, IMAGE, 4)])


def test_offloaded_caches(model, batch):
    cache = DynamicCache()
    cache.offloading = True  # as DynamicCache(offloading=True) sets it, which asks for a device
    with pytest.raises(PatchError, match=f"{CACHE}: got DynamicCache.*offloaded cache cannot hold the lanes"):
        model(**batch.by_ids(), past_key_values=cache)


class Compressed(DynamicLayer):
    """A layer that keeps something else than it is given."""


def test_caches_with_other_layers(model, batch):
    cache = DynamicCache()
    cache.layers = [Compressed() for _ in range(LAYERS)]
    with pytest.raises(PatchError, match=f"{CACHE}: got DynamicCache of Compressed, expected a DynamicCache"):
        model(**batch.by_ids(), past_key_values=cache)
