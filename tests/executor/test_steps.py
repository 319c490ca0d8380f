"""Decode steps: their tables lie on the device, and no value is looked at."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vis_sparse
from vis_sparse.plans.plan import VisualPlan

from ..models import IMAGE, LAYERS, deep_model, extended, make_batch, make_model, random_plan, run
from .test_cache import continues, select

BATCHES = {
    "one": ([(5, IMAGE, 4)], "left"),
    "left": ([(5, IMAGE, 4), (2, IMAGE, 3)], "left"),
    "right": ([(5, IMAGE, 4), (2, IMAGE, 3)], "right"),
    "ragged": ([(5, IMAGE, 4), (2, IMAGE, 3, IMAGE, 1), (7,)], "left"),
}


@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_steps_are_the_unpatched_models(name):
    """One column masked behind the prompt too, which nobody may read."""
    reference = make_model("llama-gqa")
    batch = make_batch(reference, *BATCHES[name])
    longer = extended(reference, batch, 3)
    longer.attention_mask[0, batch.length] = 0
    cuts = range(batch.length, longer.length)
    expected = run(reference, longer, cuts)[0][:, batch.length + 1 :]
    model = vis_sparse.patch(make_model("llama-gqa"), VisualPlan.dense(LAYERS))
    torch.testing.assert_close(run(model, longer, cuts)[0][:, batch.length + 1 :], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_stays_unread_without_a_mask():
    """What the prompt's mask said holds on."""
    model = vis_sparse.patch(make_model("llama-gqa"), random_plan(600))
    batch = make_batch(model, *BATCHES["left"])
    longer = extended(model, batch, 1)
    step = dict(input_ids=longer.input_ids[:, -1:], position_ids=longer.position_ids[:, -1:])
    given = model(**step, past_key_values=run(model, batch)[1], attention_mask=longer.attention_mask).logits
    torch.testing.assert_close(model(**step, past_key_values=run(model, batch)[1]).logits, given)


@torch.no_grad()
def test_reordered_between_steps():
    reference, plan = make_model("llama-gqa"), random_plan(601)
    model, batch = vis_sparse.patch(make_model("llama-gqa"), plan), make_batch(reference, *BATCHES["ragged"])
    _, cache = run(model, batch)
    batch = extended(reference, batch, 2)
    _, cache = run(model, batch, [batch.length - 1], cache=cache, start=batch.length - 2)
    for rows in ([2, 0, 1], [1, 1, 0]):
        cache.reorder_cache(torch.tensor(rows))
        batch = extended(reference, select(batch, rows), 1)
        _, cache = run(model, batch, cache=cache, start=batch.length - 1)
    continues((reference, model, plan, None, None), batch, cache)


@torch.no_grad()
def test_more_steps_than_there_was_room_for():
    model = vis_sparse.patch(make_model("llama-gqa"), random_plan(602))
    batch = make_batch(model, *BATCHES["left"])
    longer = extended(model, batch, 30)
    whole = run(model, longer)[0][:, batch.length :]
    steps = run(model, longer, range(batch.length, longer.length))[0][:, batch.length :]
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", ["dense", *vis_sparse.plan_names()])
def test_a_step_looks_at_no_value(plan):
    """Under FakeTensor, where a look at a value raises; a padded batch, with a mask."""
    model = deep_model(8, torch.float32)
    vis_sparse.patch(model, plan, heads="first")
    batch = make_batch(model, *BATCHES["left"])
    batch = batch.__class__(**{**vars(batch), "pixel_values": batch.pixel_values.float()})
    longer = extended(model, batch, 2)
    with torch.no_grad():
        cache = run(model, batch)[1]
        run(model, longer, [longer.length - 1], cache=cache, start=batch.length)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        step = dict(
            input_ids=torch.zeros(2, 1, dtype=torch.long),
            attention_mask=torch.ones(2, longer.length + 1, dtype=torch.long),
            position_ids=torch.zeros(2, 1, dtype=torch.long),
        )
        assert model(**step, past_key_values=cache).logits.shape == (2, 1, model.config.text_config.vocab_size)
