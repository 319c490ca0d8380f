"""The cache of a patched model: what transformers does with caches gives what doing it to the prompt gives."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import vis_sparse
from vis_sparse.layout.layout import VisualLayout

from .. import oracle
from ..models import IMAGE, extended, make_batch, make_model, random_plan, run

SAMPLES = ((5, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (7,))
PLANS = [(seed, semantics) for seed in (600, 601, 602) for semantics in ("exclude", "zero")]


@pytest.fixture(params=PLANS, ids=lambda p: f"{p[1]}-{p[0]}")
def setup(request):
    """(reference, patched model, plan, batch, cache that holds the batch)."""
    plan = random_plan(*request.param)
    reference, model = make_model("llama-gqa"), vis_sparse.patch(make_model("llama-gqa"), plan)
    batch = make_batch(reference, SAMPLES)
    with torch.no_grad():
        _, cache = run(model, batch)
    return reference, model, plan, batch, cache


@torch.no_grad()
def continues(setup, batch, cache):
    """Two calls on `cache` give what the oracle makes of the whole of `batch` and four more tokens."""
    reference, model, plan, _, _ = setup
    assert cache.get_seq_length() == batch.length
    longer = extended(reference, batch, 4)
    logits, cache = run(model, longer, [batch.length + 3], cache=cache, start=batch.length)
    expected = oracle.logits(reference, plan, batch.layout, longer.embeds, longer.attention_mask)[:, batch.length :]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert cache.get_seq_length() == longer.length


def select(batch, rows: list[int]):
    """The batch made of the samples `rows`."""
    segments = [
        (replace(s, sample=place)) for place, row in enumerate(rows) for s in batch.layout.segments if s.sample == row
    ]
    return replace(
        batch,
        samples=tuple(batch.samples[row] for row in rows),
        input_ids=batch.input_ids[rows],
        attention_mask=batch.attention_mask[rows],
        embeds=batch.embeds[rows],
        layout=VisualLayout(len(rows), tuple(segments)),
    )


def cropped(batch, length: int):
    segments = tuple(s for s in batch.layout.segments if s.end <= length)
    return replace(
        batch,
        input_ids=batch.input_ids[:, :length],
        attention_mask=batch.attention_mask[:, :length],
        embeds=batch.embeds[:, :length],
        layout=VisualLayout(batch.layout.batch_size, segments),
    )


def test_length_is_that_of_the_sequence(setup):
    *_, batch, cache = setup
    assert cache.get_seq_length() == batch.length
    assert all(cache.get_seq_length(layer) == batch.length for layer in range(len(cache)))
    assert cache.get_mask_sizes(1, 0) == (batch.length + 1, 0)
    assert not cache.is_compileable
    continues(setup, batch, cache)


def test_reorder(setup):
    *_, batch, cache = setup
    rows = [1, 1, 0]
    cache.reorder_cache(torch.tensor(rows))
    continues(setup, select(batch, rows), cache)


def test_repeat_interleave(setup):
    *_, batch, cache = setup
    cache.batch_repeat_interleave(2)
    continues(setup, select(batch, [0, 0, 1, 1, 2, 2]), cache)


@pytest.mark.parametrize("rows", [[2, 0], [1], [2]], ids=str)
def test_select(setup, rows):
    *_, batch, cache = setup
    cache.batch_select_indices(torch.tensor(rows))
    continues(setup, select(batch, rows), cache)


def cut_at(batch, row: int, place: str) -> int:
    """A column of sample `row`: in its closing text, between its pictures, or before all of them."""
    pictures = [s for s in batch.layout.segments if s.sample == row]
    return {"text": pictures[-1].end + 1, "between": pictures[-1].start, "before": pictures[0].start}[place]


@pytest.mark.parametrize("place", ["text", "between", "before"])
@pytest.mark.parametrize("row", [0, 1], ids=["padded", "unpadded"])
def test_crop(setup, row, place):
    """One sample, since a cut that is good for one goes through pictures of another."""
    *_, batch, cache = setup
    length = cut_at(batch, row, place)
    cache.batch_select_indices(torch.tensor([row]))
    cache.crop(length - batch.length)
    continues(setup, cropped(select(batch, [row]), length), cache)


@pytest.mark.parametrize("removed", [-2, torch.tensor(-2)], ids=["int", "tensor"])
def test_crop_of_a_batch(setup, removed):
    """Up to transformers 5.17, drafting passes a tensor."""
    *_, batch, cache = setup
    cache.crop(removed)
    continues(setup, cropped(batch, batch.length - 2), cache)


def test_crop_and_another_picture(setup):
    """The columns of a picture that was cut away are taken by another one."""
    reference, model, plan, batch, cache = setup
    cache.batch_select_indices(torch.tensor([1]))
    kept = cropped(select(batch, [1]), cut_at(batch, 1, "between"))
    cache.crop(kept.length - batch.length)
    new = make_batch(reference, [(1, IMAGE, 2)], seed=8)
    whole = replace(
        kept,
        input_ids=torch.cat([kept.input_ids, new.input_ids], dim=1),
        attention_mask=torch.cat([kept.attention_mask, new.attention_mask], dim=1),
        embeds=torch.cat([kept.embeds, new.embeds], dim=1),
        pixel_values=torch.cat([batch.pixel_values[:1], new.pixel_values]),
        layout=VisualLayout(1, kept.layout.segments + new.layout.shifted(kept.length).segments),
    )
    with torch.no_grad():
        _, cache = run(model, whole, cache=cache, start=kept.length)
    continues(setup, whole, cache)


def test_grow_after_each(setup):
    """Operations in a row, tokens between them."""
    reference, model, plan, batch, cache = setup
    cache.batch_repeat_interleave(2)
    batch = extended(reference, select(batch, [0, 0, 1, 1, 2, 2]), 2)
    with torch.no_grad():
        _, cache = run(model, batch, cache=cache, start=batch.length - 2)
    rows = [3, 0, 4, 1]
    cache.reorder_cache(torch.tensor(rows))
    cache.crop(-1)
    continues(setup, cropped(select(batch, rows), batch.length - 1), cache)


def test_copy_is_independent(setup):
    """One prompt, two continuations: the copy of a cache does not see what happens to the original."""
    reference, model, _, batch, cache = setup
    kept = copy.deepcopy(cache)
    with torch.no_grad():
        run(model, extended(reference, batch, 3), cache=cache, start=batch.length)
    continues(setup, batch, kept)


def test_reset(setup):
    reference, model, plan, batch, cache = setup
    cache.reset()
    assert cache.get_seq_length() == 0
    logits, _ = run(model, batch, cache=cache)
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask)
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    assert (logits - expected)[rows].abs().max() <= 1e-5 * expected[rows].abs().max()


@pytest.mark.parametrize("configured", [False, True])
def test_the_callers_cache_is_used(setup, configured):
    reference, model, _, batch, _ = setup
    cache = DynamicCache(config=reference.config.text_config) if configured else DynamicCache()
    with torch.no_grad():
        _, returned = run(model, batch, cache=cache)
    assert returned is cache
    continues(setup, batch, cache)
