"""A call's layout, tables, prompt and cache: its own, whatever came before it."""

import functools
from dataclasses import replace

import pytest
import torch

import vis_sparse
from vis_sparse.patches import unpatched
from vis_sparse.patches.family import prompt_ends
from vis_sparse.plans.plan import VisualPlan

from ..models import IMAGE, LAYERS, extended, make_batch, make_model, random_plan, run

EXACT = dict(atol=1e-9, rtol=1e-9)
FASTV = VisualPlan.fastv(LAYERS, 1, 0.3)


@pytest.fixture
def model():
    return vis_sparse.patch(make_model("llama-gqa"), random_plan(3))


@torch.no_grad()
def test_a_layout_ends_with_its_call(model):
    """Rows of the same shape, given to the text model alone, are text."""
    batch, text_model = make_batch(model, [(3, IMAGE, 4)]), model.model.language_model
    model(**batch.by_ids())
    with pytest.warns(UserWarning, match="inputs_embeds without input_ids"):
        hidden = text_model(inputs_embeds=batch.embeds).last_hidden_state
    with unpatched(model):
        torch.testing.assert_close(hidden, text_model(inputs_embeds=batch.embeds).last_hidden_state, **EXACT)


def test_unpatch_puts_back_what_the_caller_put_there():
    model = make_model()
    places = (model.model, "get_image_features"), (model.model.language_model, "forward")
    calls = []

    def noting(plain):
        @functools.wraps(plain)
        def mine(*args, **kwargs):
            calls.append(plain.__name__)
            return plain(*args, **kwargs)

        return mine

    for module, name in places:
        setattr(module, name, noting(getattr(module, name)))
    mine = [vars(module)[name] for module, name in places]
    batch = make_batch(model, [(3, IMAGE, 4)])
    vis_sparse.patch(model, random_plan(3), verify=False)
    del calls[:]
    model(**batch.by_ids())
    assert calls == ["get_image_features"], "lanes stand for the text model's forward alone"
    vis_sparse.unpatch(model)
    assert [vars(module)[name] for module, name in places] == mine


@torch.no_grad()
def test_tables_are_those_of_the_mask(model):
    whole = make_batch(model, [(5, IMAGE, 4)])
    run(model, whole)
    mask = whole.attention_mask.clone()
    mask[:, :2] = 0
    padded = replace(whole, attention_mask=mask)
    again = vis_sparse.patch(make_model("llama-gqa"), random_plan(3))
    torch.testing.assert_close(run(model, padded)[0][:, 2:], run(again, padded)[0][:, 2:], **EXACT)


@torch.no_grad()
def test_chunks_of_one_length_have_tables_of_their_own(model):
    """Text alone, as long as the first call: what they read lies before them."""
    batch = make_batch(model, [(8, IMAGE, 12)])
    end = batch.length
    whole = run(model, batch)[0]
    for cuts in ([4, end - 8, end - 4], [end - 12, end - 8, end - 4]):
        torch.testing.assert_close(run(model, batch, cuts)[0], whole, **EXACT)


@torch.no_grad()
def test_tables_are_those_of_the_length(model):
    short = make_batch(model, [(5, IMAGE, 4)])
    long = extended(model, short, 3)
    expected = run(model, long)[0]
    again = vis_sparse.patch(make_model("llama-gqa"), random_plan(3))
    for batch in (short, long):
        torch.testing.assert_close(run(again, batch)[0], expected[:, : batch.length], **EXACT)


@torch.no_grad()
def test_positions_go_on_where_the_cache_ends(model):
    """For callers who give none."""
    text_model, batch = model.model.language_model, make_batch(model, [(3, IMAGE, 6)])
    with vis_sparse.use_layout(model, batch.layout):
        expected = text_model(inputs_embeds=batch.embeds).last_hidden_state
        cache = text_model(inputs_embeds=batch.embeds[:, :-2], use_cache=True).past_key_values
        hidden = text_model(inputs_embeds=batch.embeds[:, -2:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(hidden, expected[:, -2:], **EXACT)


@torch.no_grad()
def test_positions_of_several_samples_start_again(model):
    """That is no packing."""
    batch = make_batch(model, [(3, IMAGE, 4), (5, IMAGE, 2)])
    call = dict(inputs_embeds=batch.embeds, position_ids=torch.arange(batch.length).expand(2, -1))
    with vis_sparse.use_layout(model, batch.layout):
        torch.testing.assert_close(model(**call).logits, model(inputs_embeds=batch.embeds).logits, **EXACT)


@torch.no_grad()
def test_no_cache_where_none_is_wanted(model):
    batch = make_batch(model, [(3, IMAGE, 4)])
    assert model(**batch.by_ids(), use_cache=False).past_key_values is None


# Where prompts end


def test_prompts_end_at_the_first_label():
    assert prompt_ends(torch.tensor([[-100, -100, 3, 4], [-100, 3, -100, 4], [-100] * 4])).tolist() == [2, 1, 4]


@torch.no_grad()
def test_prompt_lengths_follow_repeated_samples():
    """Each sample's length goes with its copies, which follow it."""
    model = vis_sparse.patch(make_model("llama-gqa"), FASTV)
    batch = make_batch(model, [(3, IMAGE, 9), (5, IMAGE, 7)])
    call = {name: tensor.repeat_interleave(2, 0) for name, tensor in batch.by_embeds().items()}
    with vis_sparse.use_layout(model, batch.layout), vis_sparse.use_prompt(model, (3 + 16 + 2, 5 + 16 + 5)):
        expected = model(**batch.by_embeds()).logits
        torch.testing.assert_close(model(**call).logits, expected.repeat_interleave(2, 0), **EXACT)


@torch.no_grad()
def test_labels_behind_a_cache():
    """Labels are those of the call's columns; the prompt began before them."""
    model = vis_sparse.patch(make_model("llama-gqa"), FASTV)
    batch, start, end = make_batch(model, [(8, IMAGE, 12)]), 7, 8 + 16 + 3
    labels = torch.where(torch.arange(batch.length) >= end, batch.input_ids, -100)
    expected = model(**batch.by_ids(), labels=labels).logits
    head = dict(input_ids=batch.input_ids[:, :start], use_cache=True)
    rest = dict(input_ids=batch.input_ids[:, start:], pixel_values=batch.pixel_values, labels=labels[:, start:])
    logits = model(**rest, past_key_values=model(**head).past_key_values).logits
    torch.testing.assert_close(logits, expected[:, start:], **EXACT)
