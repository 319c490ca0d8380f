"""torch.compile: the lanes trace without graph breaks for a fixed layout, and a compiled patched model stays right."""

import pytest
import torch

import vis_sparse
from vis_sparse.plans.before import TokensBefore
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood
from vis_sparse.plans.plan import VisualPlan

from ..marks import slow_but
from ..models import HEADS, IMAGE, deep_model, make_batch

LAYERS = 3
SPARSE = LayerPlan(True, Neighborhood(1, "both"), (True, False) * (HEADS // 2), 0.5)
PLANS = {
    "dense": VisualPlan.dense(LAYERS),
    "sparse": VisualPlan((SPARSE, LayerPlan(attention="none"), LayerPlan.off())),
    "zero": VisualPlan((SPARSE,) * LAYERS, semantics="zero"),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("plan", slow_but(["sparse"], PLANS))
@torch.no_grad()
def test_lanes_trace_in_one_graph(plan):
    model = vis_sparse.patch(deep_model(LAYERS, torch.float32), PLANS[plan])
    batch = make_batch(model, [(5, IMAGE, 4)])
    text_model, embeds = model.model.language_model, batch.embeds.float()
    state = text_model._vis_sparse
    with vis_sparse.use_layout(model, batch.layout):
        expected = text_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    (call,) = state.kept_calls._calls.values()
    position_ids = torch.arange(embeds.shape[1])[None]
    cos, sin = text_model.rotary_emb(embeds, position_ids=position_ids)
    run = torch.compile(state.executors[state.default].run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(text_model.norm(run(embeds, cos, sin, call)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, TokensBefore("relevance", 0.5), TokensBefore("received", 0.5)])
@torch.no_grad()
def test_compiled_model_under_which_tokens_leave(before):
    """Its layers run uncompiled: their rows depend on values."""
    plan = VisualPlan.pyramiddrop(LAYERS, stages=3).replace(before=before)
    model = vis_sparse.patch(deep_model(LAYERS, torch.float32), plan)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (1, 2):
        inputs = make_batch(deep_model(LAYERS), [(5, IMAGE, 4)], seed=seed).by_ids()
        inputs["pixel_values"] = inputs["pixel_values"].float()
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_follows_its_weights():
    model = vis_sparse.patch(deep_model(LAYERS, torch.float32), PLANS["sparse"])
    inputs = make_batch(model, [(5, IMAGE, 4)]).by_ids()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    compiled = torch.compile(model, backend="aot_eager")
    for scale in (1.0, 1.0, 0.5):
        model.model.language_model.layers[0].self_attn.q_proj.weight.mul_(scale)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
