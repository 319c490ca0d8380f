"""Plans under which visual tokens leave: which ones stay, and that all else is the oracle's without them."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import vis_sparse
from vis_sparse.calibration.probe import Probe
from vis_sparse.calibration.profiles import Target
from vis_sparse.eval.launches import Launches
from vis_sparse.executor.token_scores import on_host
from vis_sparse.executor.tokens import choose
from vis_sparse.layout.layout import LayoutError, VisualLayout
from vis_sparse.layout.packing import visual_coordinates
from vis_sparse.plans.layer_plan import TOKEN_ORDERS, LayerPlan, Neighborhood, PlanError, TokenBudget
from vis_sparse.plans.plan import VisualPlan

from .. import oracle
from ..calibration.samples import make_sample
from ..marks import slow_but
from ..models import (
    HEADS,
    IMAGE,
    LAYERS,
    TEXT_MODELS,
    cuts_for,
    dropping,
    extended,
    make_batch,
    make_model,
    run,
    text_inputs,
)
from .test_cache import select
from .test_dispatch import call_of
from .test_parity import SCENARIOS, check, every_backend, every_text, one_fast_text, unpatched

NEAR = Neighborhood(1, "both")
SAMPLES = ((5, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (7,))


def then(budget: TokenBudget, layer: LayerPlan) -> VisualPlan:
    """`budget` after the first layer, then layers like `layer`."""
    return VisualPlan((LayerPlan(tokens=budget), *[layer] * (LAYERS - 1)))


PLANS = {
    "fastv": VisualPlan.fastv(LAYERS, after=1),
    "pyramiddrop": VisualPlan.pyramiddrop(LAYERS, stages=3),
    **{by: then(TokenBudget(0.4, by), LayerPlan()) for by in TOKEN_ORDERS},
    "near": then(TokenBudget(0.6), LayerPlan(attention=NEAR)),
    "causal": then(TokenBudget(0.6, "norm"), LayerPlan(attention=Neighborhood(1, frames=1, stride=2))),
    "yopo": then(TokenBudget(0.5), LayerPlan(True, NEAR, (True, False) * (HEADS // 2), 0.5)),
    "one group": then(TokenBudget(0.5, "norm"), LayerPlan(True, NEAR, (False, True, *[False] * (HEADS - 2)), 0.5)),
    "unread between": VisualPlan((LayerPlan(tokens=TokenBudget(0.5)), LayerPlan(text_reads=False), LayerPlan())),
}


# Which tokens stay.

TWO = VisualLayout.from_grids([[(1, (1, 2, 3)), (9, (1, 1, 2))], [(0, (1, 4, 4))]])


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (TokenBudget(0.5, "uniform"), [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]),
        (TokenBudget(0.3, "uniform"), [2, 6, 10, 14, 18, 22]),
        # the first of 2 rows of 3, one of 2 columns, every second column of 4 x 4
        (TokenBudget(0.5, "stride"), [0, 1, 2, 6, 8, 10, 12, 14, 16, 18, 20, 22]),
        (TokenBudget(0.25, "stride"), [0, 2, 6, 8, 10, 16, 18]),
    ],
)
def test_orders_that_look_at_places(budget, kept):
    visual = visual_coordinates(TWO)
    assert choose(budget, 0, visual, None).tolist() == kept


@pytest.mark.parametrize("by", ["attention", "norm"])
def test_orders_by_score_take_the_highest_and_of_equal_ones_the_first(by):
    visual = visual_coordinates(TWO)
    scores = np.zeros(24)
    scores[[7, 2, 20]] = 3, 2, 1
    assert choose(TokenBudget(0.25, by), 0, visual, scores).tolist() == [2, 7, 8, 9, 10, 20]


def test_random_tokens_are_the_same_in_every_call_and_others_in_every_layer():
    visual, budget = visual_coordinates(TWO), TokenBudget(0.5, "random")
    assert choose(budget, 1, visual, None).tolist() == choose(budget, 1, visual, None).tolist()
    assert choose(budget, 1, visual, None).tolist() != choose(budget, 2, visual, None).tolist()
    of_second = choose(budget, 1, visual, None)[4:] - 8
    alone = visual_coordinates(VisualLayout.from_grids([[(3, (1, 4, 4))]]))
    assert choose(budget, 1, alone, None).tolist() == of_second.tolist(), "whatever else is in the batch"


# The executor against the oracle.


def calls_of(scenario, model, plan):
    batch, cuts = scenario.build(model)
    return batch, [cut for cut in cuts if cut in cuts_for(plan, batch)]


def held(text, plan, scenario, backend, dtype=torch.float64, **bound):
    """The scenario's calls under `plan`, against the oracle."""
    reference = unpatched(text, dtype)
    batch, cuts = calls_of(scenario, reference, plan)
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask, cuts=cuts)
    with vis_sparse.patched(make_model(text, dtype=dtype), plan, backend=backend) as model:
        logits, cache = run(model, batch, cuts, scenario.by)
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    check(logits, expected, rows, **bound or {"relative": 1e-5})
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [batch.length] * LAYERS


@every_backend
@pytest.mark.parametrize("scenario", slow_but(["left", "ragged", "chunks"], SCENARIOS))
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_plans_are_the_oracle(plan, scenario, backend):
    held("llama-gqa", PLANS[plan], SCENARIOS[scenario], backend)


@every_backend
@pytest.mark.parametrize("scenario", SCENARIOS)
@one_fast_text
@torch.no_grad()
def test_random_plan_is_the_oracle(text, scenario, backend):
    held(
        text,
        dropping(700 + 20 * TEXT_MODELS.index(text) + list(SCENARIOS).index(scenario)),
        SCENARIOS[scenario],
        backend,
    )


@every_backend
@pytest.mark.parametrize("plan", ["fastv", "near"])
@torch.no_grad()
def test_float32(plan, backend):
    held("llama-gqa", PLANS[plan], SCENARIOS["left"], backend, torch.float32, absolute=1e-4)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_tokens_that_left_keep_their_last_value(plan):
    """Hidden states of all rows, layer after layer."""
    reference, plan = unpatched("llama-gqa"), PLANS[plan]
    batch = make_batch(reference, SAMPLES)
    arguments = (reference.model.language_model, plan, batch.layout, batch.embeds, batch.attention_mask)
    expected = oracle.hidden_states(*arguments)
    model = vis_sparse.patch(make_model("llama-gqa"), plan)
    out = model.model(**batch.by_ids(), output_hidden_states=True)
    for index, (actual, wanted) in enumerate(zip(out.hidden_states, expected, strict=True)):
        check(actual, wanted, oracle.compared_rows(plan, batch.layout, batch.attention_mask, index), relative=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_gradients(plan):
    plan = PLANS[plan]
    reference, model = make_model("llama-gqa"), vis_sparse.patch(make_model("llama-gqa"), plan)
    batch = make_batch(reference, SAMPLES)
    rows = batch.attention_mask.bool() & ~oracle.grid_of(batch.layout, batch.length).visual
    embeds = text_inputs(reference, **batch.by_ids(), grad=True)
    oracle.logits(reference, plan, batch.layout, embeds, batch.attention_mask)[rows].square().sum().backward()
    model(**batch.by_ids()).logits[rows].square().sum().backward()
    gradients = {name: tensor.grad for name, tensor in model.named_parameters()}
    for name, tensor in reference.named_parameters():
        wanted = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        grad = torch.zeros_like(tensor) if gradients[name] is None else gradients[name]
        assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1), name
    model.zero_grad()
    model.train().gradient_checkpointing_enable()
    model(**batch.by_ids(), use_cache=False).logits[rows].square().sum().backward()
    for name, tensor in model.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(tensor.grad, gradients[name], msg=name)


# Generating, and the cache.


@every_text
@torch.no_grad()
def test_greedy_is_the_oracles(text):
    reference = make_model(text)
    batch = make_batch(reference, SAMPLES)
    for plan in (PLANS["fastv"], dropping(720 + TEXT_MODELS.index(text))):
        expected = oracle.greedy(reference, plan, batch.layout, batch.embeds, batch.attention_mask, 5)
        model = vis_sparse.patch(make_model(text), plan)
        settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(model.generate(**batch.to_generate(), **settings)[:, batch.length :], expected)


@pytest.mark.parametrize("plan", ["fastv", "pyramiddrop", "yopo"])
@torch.no_grad()
def test_beams_score_as_the_oracle_says(plan):
    reference, plan, beams = make_model("llama-gqa"), PLANS[plan], 3
    batch = make_batch(reference, [(5, IMAGE, 4), (2, IMAGE, 3)])
    model = vis_sparse.patch(make_model("llama-gqa"), plan)
    settings = dict(max_new_tokens=5, num_beams=beams, num_return_sequences=beams, length_penalty=0.0)
    out = model.generate(**batch.to_generate(), **settings, return_dict_in_generate=True, output_scores=True)
    tokens = out.sequences[:, batch.length :]
    embeds = torch.cat([batch.embeds.repeat_interleave(beams, 0), reference.get_input_embeddings()(tokens)], dim=1)
    mask = torch.cat([batch.attention_mask.repeat_interleave(beams, 0), torch.ones_like(tokens)], dim=1)
    logits = oracle.logits(reference, plan, batch.layout.expanded(2 * beams), embeds, mask, cuts=[batch.length])
    chosen = logits[:, batch.length - 1 : -1].log_softmax(-1).gather(-1, tokens[..., None])
    torch.testing.assert_close(out.sequences_scores.double(), chosen.sum((1, 2)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_cache_of_fewer_tokens(plan):
    """Repeated, reordered, selected and cropped, it goes on as the oracle does."""
    reference, plan = unpatched("llama-gqa"), PLANS[plan]
    model = vis_sparse.patch(make_model("llama-gqa"), plan)
    batch = make_batch(reference, SAMPLES)
    _, cache = run(model, extended(reference, batch, 2, seed=6), [batch.length])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 3, 2, 0, 1, 4]))
    cache.batch_select_indices(torch.tensor([1, 2, 4]))
    cache.crop(-2)
    longer = extended(reference, select(batch, [1, 1, 0]), 4)
    cuts = [batch.length, batch.length + 3]
    logits, cache = run(model, longer, cuts, cache=cache, start=batch.length)
    expected = oracle.logits(reference, plan, longer.layout, longer.embeds, longer.attention_mask, cuts=cuts)
    check(logits, expected[:, batch.length :], slice(None), relative=1e-5)
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [longer.length] * LAYERS


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_bytes_of_the_cache_are_the_counted_ones(plan):
    model, plan = make_model("llama-gqa"), PLANS[plan]
    batch = make_batch(model, [(5, IMAGE, 4), (2, IMAGE, 7)])
    counted = vis_sparse.flops(model, plan, layout=batch.layout, text_tokens=9, kv_dtype_bytes=8)
    _, cache = run(vis_sparse.patch(model, plan), batch)
    assert sum(layer.kv_bytes for layer in cache.layers) == counted.kv_bytes


@pytest.mark.parametrize("second", [(3,), (2, IMAGE, 3)], ids=["text", "image"])
@torch.no_grad()
def test_two_turns(second):
    """The tokens of the second picture compete among themselves; those of the first stay as they are."""
    reference, plan = unpatched("llama-gqa"), PLANS["pyramiddrop"]
    model = vis_sparse.patch(make_model("llama-gqa"), plan)
    batch = make_batch(reference, [(5, IMAGE, 4, *second)])
    first = 5 + 16 + 4
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, cuts=[first])
    logits, cache = run(model, batch, [first])
    check(logits, expected, oracle.compared_rows(plan, batch.layout, batch.attention_mask), relative=1e-5)
    slots = [layer.book.slots.column.shape[1] for layer in cache.layers]
    text = batch.length - 16 * len(batch.layout.segments)
    assert slots == [text + count * len(batch.layout.segments) for count in (16, 8, 4)]


# What it costs.


def dispatched(plan, samples) -> Launches:
    model = make_model("llama", dtype=torch.float32, num_hidden_layers=6)
    batch = make_batch(model, samples)
    vis_sparse.patch(model, plan)
    with torch.no_grad():
        model(**call_of(batch))
        with Launches() as counted:
            model(**call_of(batch))
    return counted


@pytest.mark.parametrize("samples", [SAMPLES[:1], SAMPLES], ids=["one", "padded"])
@pytest.mark.parametrize("by", TOKEN_ORDERS)
def test_dropping_dispatches_little_and_waits_once(by, samples, monkeypatch):
    waits = []
    monkeypatch.setattr("vis_sparse.executor.lanes.on_host", lambda scores: waits.append(1) or on_host(scores))
    dense = dispatched(VisualPlan.dense(6), samples)
    fastv = dispatched(VisualPlan.fastv(6, by=by), samples)
    assert len(waits) == 2 * (by in ("attention", "norm")), "one in each of the two calls"
    # the dense plan keeps its rows as they come; layers around a choice do not
    assert sum(fastv.ops.values()) - sum(dense.ops.values()) <= 30, fastv.ops - dense.ops
    for read in ("aten._local_scalar_dense.default", "aten.nonzero.default"):
        assert fastv.ops[read] == dense.ops[read]


@torch.no_grad()
def test_what_is_left_is_plain_causal_attention():
    """After tokens left, one kernel call a layer over all rows, without a mask."""
    model = make_model("llama", dtype=torch.float32, num_hidden_layers=4)
    batch = make_batch(model, [(5, IMAGE, 4), (5, IMAGE, 4)])
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, is_causal=False, **settings):
        seen.append((tuple(query.shape[:3:2]), key.shape[2], attn_mask is None, is_causal))
        return attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **settings)

    vis_sparse.patch(model, VisualPlan.pyramiddrop(4), backend="torch")
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr("vis_sparse.kernels.tiled.F.scaled_dot_product_attention", spy)
        model(**call_of(batch), use_cache=False)
    mine = [call for call in seen if call[2:] == (True, True)][-3:]
    assert mine == [((2, rows), rows, True, True) for rows in (9 + 16, 9 + 8, 9 + 4)]


# What is refused.


@pytest.mark.parametrize("samples", [[(3, IMAGE)], [(5, IMAGE, 4), (3, IMAGE, 2, IMAGE)]], ids=["one", "second image"])
@torch.no_grad()
def test_images_without_text_after_them_have_nobody_to_choose(samples):
    batch = make_batch(make_model(), samples, padding="right")
    model = vis_sparse.patch(make_model(), PLANS["fastv"])
    first = [s for s in batch.layout.segments if s.sample == len(samples) - 1][-1].start
    message = (
        f"tokens: got a call with the visual token at position {first} of sample {len(samples) - 1} and no text after "
        "it, expected text of the prompt after the images of every call (by attention, its last row chooses)"
    )
    with pytest.raises(LayoutError, match=re.escape(message)):
        run(model, batch)
    with vis_sparse.patched(model, PLANS["norm"]):
        run(model, batch)  # other orders need no text


@torch.no_grad()
def test_a_refused_call_leaves_its_cache_as_it_was():
    reference, plan = unpatched("llama"), PLANS["fastv"]
    model = vis_sparse.patch(make_model(), plan)
    batch = make_batch(reference, [(4, IMAGE, 3)])
    # the first chunk has no image, and no lanes of its own unless the layout says that one comes
    _, cache = run(model, batch_until(batch, 4))
    with pytest.raises(LayoutError, match="no text after it"):
        run(model, batch_until(batch, 20), cache=cache, start=4)
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [4] * LAYERS
    logits, _ = run(model, batch, cache=cache, start=4)
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, cuts=[4])
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    check(logits, expected[:, 4:], rows[:, 4:], relative=1e-5)


def batch_until(batch, end: int):
    """The batch's first `end` columns."""
    segments = [s for s in batch.layout.segments if s.end <= end]
    return replace(
        batch,
        input_ids=batch.input_ids[:, :end],
        attention_mask=batch.attention_mask[:, :end],
        embeds=batch.embeds[:, :end],
        pixel_values=batch.pixel_values if segments else None,
        layout=VisualLayout(batch.layout.batch_size, segments),
    )


def test_the_search_does_not_measure_plans_that_drop_tokens():
    model = make_model()
    probe = Probe(Target.of(model), [make_sample(model)])
    kept = probe.plan
    with pytest.raises(PlanError, match="plan 'fastv': tokens: got a plan under which visual tokens leave"):
        probe.divergence(VisualPlan.fastv(LAYERS, 1))
    with pytest.raises(PlanError, match="expected one that keeps them all"):
        probe.adopt(PLANS["stride"])
    assert probe.plan == kept
