"""What a layer of the cache does with its samples, columns and bytes, where `test_cache` does not look."""

import pytest
import torch

import vis_sparse
from vis_sparse.plans.plan import VisualPlan

from ..models import IMAGE, LAYERS, extended, make_batch, make_model, random_plan, run
from .test_cache import continues, cropped, select

SAMPLES = ((5, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (7,))


def filled(samples, plan):
    """(reference, patched model, plan, batch, cache that holds the batch), as `continues` takes them."""
    reference, model = make_model("llama-gqa"), vis_sparse.patch(make_model("llama-gqa"), plan)
    batch = make_batch(reference, samples)
    with torch.no_grad():
        return reference, model, plan, batch, run(model, batch)[1]


@torch.no_grad()
def test_reorder_of_samples_with_images_at_other_columns():
    """Nothing is padded, yet each sample has slots of its own: one keeps its image, the other its text."""
    setup = filled([(IMAGE, 17), (16, IMAGE, 1)], VisualPlan.dense(LAYERS))
    *_, batch, cache = setup
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(16 - batch.length)
    continues(setup, cropped(select(batch, [1, 0]), 16), cache)


def test_crop_to_a_length():
    setup = filled([(2, IMAGE, 7)], random_plan(600))
    *_, batch, cache = setup
    cache.crop(batch.length - 3)
    continues(setup, cropped(batch, batch.length - 3), cache)
    cache.crop(10**6)
    assert cache.get_seq_length() == batch.length - 3 + 4, "no longer than it was"


@pytest.mark.parametrize("mask", [[True, False, True], [False, True, False]], ids=["two", "one"])
def test_select_by_a_mask(mask):
    setup = filled(SAMPLES, random_plan(601))
    *_, batch, cache = setup
    cache.batch_select_indices(torch.tensor(mask))
    continues(setup, select(batch, [row for row, kept in enumerate(mask) if kept]), cache)


@torch.no_grad()
def test_bytes_are_those_of_the_slots_in_use():
    """Of a prompt and decode steps as many as of all columns at once, though stores have room to grow."""
    model = vis_sparse.patch(make_model("llama-gqa"), random_plan(602))
    batch = make_batch(model, SAMPLES)
    whole = extended(model, batch, 3)
    _, at_once = run(model, whole)
    _, stepwise = run(model, whole, range(batch.length, whole.length))
    assert [layer.kv_bytes for layer in stepwise.layers] == [layer.kv_bytes for layer in at_once.layers]
