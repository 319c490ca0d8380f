"""Layers in which visual tokens attend in no head: what their output projection adds to nothing is its bias."""

import peft
import pytest
import torch

import vis_sparse
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood
from vis_sparse.plans.plan import VisualPlan

from .. import oracle
from ..models import HEADS, IMAGE, IMAGE_TOKEN, TEXT_MODELS, make_batch, make_model, run

NO_HEAD = (False,) * HEADS
EXACT = dict(atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
@pytest.mark.parametrize("text", TEXT_MODELS)
@torch.no_grad()
def test_the_bias_is_added(text, semantics):
    model = make_model(text)
    batch = make_batch(model, [(3, IMAGE, 4), (2, IMAGE, 6)])
    attends = (LayerPlan(), LayerPlan(False, Neighborhood(1), NO_HEAD), LayerPlan())
    skips = (LayerPlan(), LayerPlan(False, "none", NO_HEAD), LayerPlan())
    found = {}
    for name, layers in (("attends", attends), ("skips", skips)):
        plan = VisualPlan(layers, semantics=semantics)
        expected = oracle.logits(model, plan, batch.layout, batch.embeds, batch.attention_mask)
        with vis_sparse.patched(model, plan):
            found[name], _ = run(model, batch)
        text_rows = batch.attention_mask.bool() & (batch.input_ids != IMAGE_TOKEN)
        torch.testing.assert_close(found[name][text_rows], expected[text_rows], atol=1e-5, rtol=1e-5)
    bias = model.model.language_model.layers[0].self_attn.o_proj.bias
    assert torch.allclose(found["attends"][text_rows], found["skips"][text_rows]) == (bias is None)


@torch.no_grad()
def test_rows_that_nobody_reads_any_more_get_no_bias():
    """They leave attention as they came, whatever the plan says of it, and keep that value to the end."""
    model = make_model("llama-bias")
    batch = make_batch(model, [(3, IMAGE, 4)])
    visual = batch.input_ids == IMAGE_TOKEN
    found = []
    for dead in (LayerPlan(), LayerPlan(attention="none", ffn=0)):
        plan = VisualPlan((LayerPlan(), dead, LayerPlan(False)), "p")
        with vis_sparse.patched(model, plan):
            found.append(model.model(**batch.by_ids(), output_hidden_states=True).hidden_states)
    for states in found:
        torch.testing.assert_close(states[2][visual], states[1][visual], **EXACT)
    torch.testing.assert_close(found[0][-1], found[1][-1], **EXACT)


@torch.no_grad()
def test_the_bias_of_a_wrapped_projection_is_added():
    model = make_model("llama-bias")
    batch = make_batch(model, [(3, IMAGE, 4)])
    plan = VisualPlan((LayerPlan(), LayerPlan(False, Neighborhood(1), NO_HEAD), LayerPlan()))
    vis_sparse.patch(model, plan)
    expected, _ = run(model, batch)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], r=2))  # which starts as nothing
    torch.testing.assert_close(run(adapted.get_base_model(), batch)[0], expected, **EXACT)
