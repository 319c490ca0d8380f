"""Plans under which visual tokens leave before the decoder: all else is the oracle's without them, under any plan."""

import re

import numpy as np
import pytest
import torch

import vis_sparse
from vis_sparse import LayerPlan, LayoutError, Neighborhood, PlanError, TokenBudget, TokensBefore, VisualPlan
from vis_sparse.calibration.probe import Probe
from vis_sparse.calibration.profiles import Target
from vis_sparse.executor.before_scores import change, relevance
from vis_sparse.executor.tokens import entering
from vis_sparse.layout.packing import visual_coordinates

from .. import oracle
from ..calibration.samples import make_sample
from ..marks import slow_but
from ..models import HEADS, IMAGE, LAYERS, TEXT_MODELS, dropping, every_cut, extended, make_batch, make_model, run
from .test_parity import SCENARIOS, check, every_backend, one_fast_text, unpatched

NEAR = Neighborhood(1, "both")
STRIDE, CHANGE, RELEVANCE = TokensBefore("stride", 0.5), TokensBefore("change", 0.5), TokensBefore("relevance", 0.4)
SAMPLES = ((5, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (7,))
PLANS = {
    "stride": VisualPlan.dense(LAYERS).replace(before=STRIDE),
    "change": VisualPlan.dense(LAYERS).replace(before=CHANGE),
    "near": VisualPlan((LayerPlan(attention=NEAR),) * LAYERS, before=STRIDE),
    "causal": VisualPlan((LayerPlan(attention=Neighborhood(1, frames=1, stride=2)),) * LAYERS, before=CHANGE),
    "yopo": VisualPlan((LayerPlan(True, NEAR, (True, False) * (HEADS // 2), 0.5),) * LAYERS, before=STRIDE),
    "fastv behind": VisualPlan.fastv(LAYERS, after=1).replace(before=STRIDE),
    "frozen": VisualPlan((LayerPlan(True, "none", None, 0.0),) * LAYERS, before=STRIDE),
    "never read": VisualPlan((LayerPlan.off(),) * LAYERS, before=STRIDE),
}


def came(plan, batch) -> torch.Tensor:
    """(batch, length) bool: all columns but those of visual tokens that stay out."""
    visual, scores = visual_coordinates(batch.layout), None
    rows = batch.embeds[visual.sample, visual.column]
    if plan.before.by == "change":
        scores = change(rows, visual).numpy()
    elif plan.before.by == "relevance":
        text = batch.attention_mask.bool().clone()
        text[visual.sample, visual.column] = False
        scores = np.zeros(len(rows))
        for segment in np.unique(visual.segment):
            own = np.flatnonzero(visual.segment == segment)
            sample = visual.sample[own[0]]
            scores[own] = relevance(rows[own], batch.embeds[sample, text[sample]], plan.before.count(len(own)))
    kept = entering(plan.before, visual, scores)
    found = torch.ones(batch.embeds.shape[:2], dtype=torch.bool)
    found[visual.sample, visual.column] = False
    found[visual.sample[kept], visual.column[kept]] = True
    return found


def held(text, plan, scenario, backend):
    """The scenario's calls under `plan`, against the oracle."""
    reference = unpatched(text)
    batch, cuts = scenario.build(reference)
    by_text = any(layer.tokens and layer.tokens.by == "attention" for layer in plan.layers)
    cuts = [cut for cut in cuts if not by_text or cut >= max((s.end for s in batch.layout.segments), default=0) + 1]
    arguments = (reference, plan, batch.layout, batch.embeds, batch.attention_mask)
    expected = oracle.logits(*arguments, cuts=cuts, came=came(plan, batch))
    with vis_sparse.patched(make_model(text), plan, backend=backend) as model:
        logits, cache = run(model, batch, cuts, scenario.by)
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    check(logits, expected, rows, relative=1e-5)
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [batch.length] * LAYERS
    if batch.layout.batch_size == 1 and batch.layout.segments:
        assert cache.layers[0].book.slots.column.shape[1] == int(came(plan, batch).sum())


@every_backend
@pytest.mark.parametrize("scenario", slow_but(["left", "frames", "ragged-right", "grid-chunks"], SCENARIOS))
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_plans_are_the_oracle(plan, scenario, backend):
    held("llama-gqa", PLANS[plan], SCENARIOS[scenario], backend)


@every_backend
@pytest.mark.parametrize("scenario", slow_but(["right", "chunks", "ragged"], SCENARIOS))
@one_fast_text
@torch.no_grad()
def test_random_plan_is_the_oracle(text, scenario, backend):
    plan = dropping(900 + 20 * TEXT_MODELS.index(text) + list(SCENARIOS).index(scenario))
    layers = (LayerPlan(**{**fields(layer), "tokens": _no_stride(layer.tokens)}) for layer in plan.layers)
    held(text, plan.replace(layers=tuple(layers), before=CHANGE), SCENARIOS[scenario], backend)


def fields(layer: LayerPlan) -> dict:
    return {name: getattr(layer, name) for name in ("text_reads", "attention", "heads", "ffn", "tokens")}


def _no_stride(budget: TokenBudget | None) -> TokenBudget | None:
    return TokenBudget(budget.keep, "norm") if budget and budget.by == "stride" else budget


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_the_prompts_text_chooses_by_relevance(padding):
    """Of several images and samples; what a call holds behind its prompt has no say."""
    reference, plan = unpatched("llama-gqa"), VisualPlan.dense(LAYERS).replace(before=RELEVANCE)
    prompt = make_batch(reference, SAMPLES[:2] if padding == "right" else SAMPLES, padding=padding)
    expected = oracle.logits(
        reference, plan, prompt.layout, prompt.embeds, prompt.attention_mask, came=came(plan, prompt)
    )
    model = vis_sparse.patch(make_model("llama-gqa"), plan)
    rows = oracle.compared_rows(plan, prompt.layout, prompt.attention_mask)
    check(run(model, prompt)[0], expected, rows, relative=1e-5)
    longer = extended(reference, prompt, 3)
    chosen = torch.cat([came(plan, prompt), torch.ones(len(rows), 3, dtype=torch.bool)], 1)
    expected = oracle.logits(reference, plan, longer.layout, longer.embeds, longer.attention_mask, came=chosen)
    with vis_sparse.use_prompt(model, prompt.length):
        ours = run(model, longer)[0]
    rows = oracle.compared_rows(plan, longer.layout, longer.attention_mask)
    check(ours, expected, rows, relative=1e-5)


@torch.no_grad()
def test_hidden_states_of_tokens_that_stay_out_are_their_embeddings():
    reference, plan = unpatched("llama-gqa"), PLANS["yopo"]
    batch = make_batch(reference, SAMPLES)
    chosen = came(plan, batch)
    arguments = (reference.model.language_model, plan, batch.layout, batch.embeds, batch.attention_mask)
    expected = oracle.hidden_states(*arguments, came=chosen)
    model = vis_sparse.patch(make_model("llama-gqa"), plan)
    out = model.model(**batch.by_ids(), output_hidden_states=True)
    for index, (actual, wanted) in enumerate(zip(out.hidden_states, expected, strict=True)):
        rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask, index)
        check(actual, wanted, rows, relative=1e-5)
        if index < LAYERS:
            assert torch.equal(actual[~chosen], out.hidden_states[0][~chosen])


@pytest.mark.parametrize("plan", ["near", "fastv behind"])
def test_gradients_flow_to_what_stays(plan):
    plan = PLANS[plan]
    reference, model = make_model("llama-gqa"), vis_sparse.patch(make_model("llama-gqa"), plan)
    batch = make_batch(reference, SAMPLES)
    visual = oracle.grid_of(batch.layout, batch.length).visual
    rows, chosen = batch.attention_mask.bool() & ~visual, came(plan, batch)
    found = []
    for of in (reference, model):
        embeds = batch.embeds.clone().requires_grad_()
        if of is model:
            with vis_sparse.use_layout(model, batch.layout):
                logits = model(**batch.by_embeds() | {"inputs_embeds": embeds}).logits
        else:
            logits = oracle.logits(reference, plan, batch.layout, embeds, batch.attention_mask, came=chosen)
        logits[rows].square().sum().backward()
        found.append((embeds.grad, {name: t.grad for name, t in of.named_parameters() if t.grad is not None}))
    (theirs, wanted), (ours, grads) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert (ours[visual & ~chosen] == 0).all()
    assert (ours[visual & chosen] != 0).any()
    for name, right in wanted.items():
        if "layers" in name:
            assert (grads[name] - right).abs().max() <= 1e-5 * right.abs().max().clamp_min(1), name


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}])
@torch.no_grad()
def test_greedy_and_beams_are_the_oracles(settings):
    reference, plan = make_model("llama-gqa"), PLANS["stride"]
    batch = make_batch(reference, [(5, IMAGE, 4), (2, IMAGE, 3)])
    model = vis_sparse.patch(make_model("llama-gqa"), plan)
    beams = settings.get("num_beams", 1)
    given = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    out = model.generate(**batch.to_generate(), **given, **settings)
    tokens = out.sequences[:, batch.length :]
    embeds = torch.cat([batch.embeds.repeat_interleave(beams, 0), reference.get_input_embeddings()(tokens)], dim=1)
    mask = torch.cat([batch.attention_mask.repeat_interleave(beams, 0), torch.ones_like(tokens)], dim=1)
    chosen = torch.cat([came(plan, batch).repeat_interleave(beams, 0), torch.ones_like(tokens).bool()], 1)
    layout = batch.layout.expanded(2 * beams)
    logits = oracle.logits(reference, plan, layout, embeds, mask, cuts=[batch.length], came=chosen)
    scores = logits[:, batch.length - 1 : -1].log_softmax(-1)
    if beams == 1:
        assert torch.equal(tokens, scores.argmax(-1))
    else:
        found = scores.gather(-1, tokens[..., None]).sum((1, 2))
        torch.testing.assert_close(out.sequences_scores.double(), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("plan", ["stride", "yopo", "fastv behind"])
@torch.no_grad()
def test_a_kept_cache_goes_on_and_its_bytes_are_the_counted_ones(plan):
    reference, plan = unpatched("llama-gqa"), PLANS[plan]
    model = vis_sparse.patch(make_model("llama-gqa"), plan)
    batch = make_batch(reference, [(5, IMAGE, 4), (2, IMAGE, 7)])
    counted = vis_sparse.flops(model, plan, layout=batch.layout, text_tokens=9, kv_dtype_bytes=8)
    _, cache = run(model, batch)
    assert sum(layer.kv_bytes for layer in cache.layers) == counted.kv_bytes
    assert counted.visual_left[0] == vis_sparse.inspect(model)["last_call"].entered == 16
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
    longer = extended(reference, make_batch(reference, [(5, IMAGE, 4), (2, IMAGE, 7)]), 4)
    rows = [1, 0, 0, 1]
    chosen = came(plan, longer)[rows]
    layout = vis_sparse.VisualLayout.from_grids([[(longer.layout.segments[row].start, IMAGE)] for row in rows])
    cuts = [batch.length, batch.length + 3]
    expected = oracle.logits(
        reference, plan, layout, longer.embeds[rows], longer.attention_mask[rows], cuts=cuts, came=chosen
    )
    ids, mask, positions = longer.input_ids[rows], longer.attention_mask[rows], longer.position_ids[rows]
    start = batch.length
    for end in (*cuts[1:], longer.length):
        call = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache)
        ours = model(input_ids=ids[:, start:end], **call).logits
        assert (ours - expected[:, start:end]).abs().max() <= 1e-5 * expected.abs().max()
        start = end


@torch.no_grad()
def test_layouts_that_repeat_keep_their_tables_by_what_stays():
    """The same prompt comes again, then one of the same layout whose tokens are others."""
    model = vis_sparse.patch(make_model("llama-gqa"), VisualPlan.dense(LAYERS).replace(before=RELEVANCE))
    batches = [make_batch(unpatched("llama-gqa"), [(5, IMAGE, 4)], seed=seed) for seed in (1, 2)]
    first = [run(model, batch)[0] for batch in batches]
    for batch, logits in zip(batches, first):
        for _ in range(2):
            assert torch.equal(run(model, batch)[0], logits)


@torch.no_grad()
def test_refusals():
    batch = make_batch(unpatched("llama-gqa"), [(5, IMAGE, 4)])
    model = vis_sparse.patch(make_model("llama-gqa"), VisualPlan.dense(LAYERS).replace(before=RELEVANCE))
    message = "before: got a call with visual tokens and no text in sample 0, expected text of the prompt in every call"
    with pytest.raises(LayoutError, match=re.escape(message)):
        run(model, batch, [cut for cut in every_cut(batch) if cut in (5, 21)])
    vis_sparse.patch(model, VisualPlan.dense(LAYERS).replace(before=TokensBefore("received", 0.5)))
    message = (
        "before: got no call of the vision tower for 16 image tokens, expected those of the call's own pixels (by "
        "received, the tower's call of the patched model says which tokens come in)"
    )
    with pytest.raises(LayoutError, match=re.escape(message)):
        run(model, batch, by="embeds")
    with pytest.raises(PlanError, match="tokens: got a plan under which visual tokens leave"):
        Probe(Target.of(unpatched("llama-gqa")), [make_sample(make_model())]).divergence(PLANS["stride"])
