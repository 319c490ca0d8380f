"""Whole models under plans with a tower section: parity, what never runs, what travels, what is refused by name."""

import copy
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vis_sparse
from vis_sparse import LayerPlan, Neighborhood, PatchError, PlanError, VisualPlan
from vis_sparse.patches.tower import blocks_of

from ..models import IMAGE, LAYERS, make_batch, make_model, run
from .cases import CASES
from .scenarios import SCENARIOS, make_request

NEAR = LayerPlan(attention=Neighborhood(1, "both"), heads=(True, False), ffn=0.5)
EXACT = dict(atol=0, rtol=0)
_FAST = ("Llava", "LlavaOnevision", "Qwen2.5VL", "InternVL (Qwen2)")


def with_tower(*layers: LayerPlan) -> VisualPlan:
    return VisualPlan.dense(LAYERS).replace(name="towered", tower=VisualPlan(layers or (LayerPlan(),) * 2, "tower"))


def small_model(dtype=torch.float32):
    return make_model("llama-gqa", dtype=dtype)


def batch_of(model):
    return make_batch(model, [(5, IMAGE, 4), (2, IMAGE, 7)])


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[] if c.name in _FAST else [pytest.mark.slow]) for c in CASES]
)
@torch.no_grad()
def test_a_dense_section_is_the_unpatched_model(case):
    model = case.build(torch.float32)
    inputs = make_request(case, SCENARIOS["video" if case.video else "two images"], torch.float32).inputs
    expected = model(**inputs).logits
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    vis_sparse.patch(model, with_tower())
    logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
    vis_sparse.patch(model, with_tower(NEAR, NEAR))
    moved = model(**inputs).logits
    vis_sparse.unpatch(model)
    real = inputs["attention_mask"].bool()
    assert (logits - expected)[real].abs().max() < 1e-4
    assert (moved - expected)[real].abs().max() > 1e-2
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=3, do_sample=False))
    torch.testing.assert_close(model(**inputs).logits, expected, **EXACT)
    hooks = {"_forward_hooks", "_output_capturing_hooks_installed"}  # transformers puts them there for good
    for name, module in model.named_modules():
        assert vars(module).keys() - hooks == before[name].keys() - hooks, name


@torch.no_grad()
def test_layers_behind_the_feature_layer_never_run():
    model = small_model()
    batch = batch_of(model)
    expected = run(model, batch)[0]
    assert model.config.vision_feature_layer == -2
    work = {}
    for kind, plan in {
        "unpatched": None,
        "section": with_tower(),
        "first layer off": with_tower(LayerPlan.off(), NEAR),
    }.items():
        if plan is not None:
            vis_sparse.patch(model, plan)
        with FlopCounterMode(display=False) as counter:
            features = model.model.get_image_features(batch.pixel_values)
        work[kind] = counter.get_total_flops()
    layer = 2 * 2 * 17 * (4 * 32 * 32 + 2 * 32 * 32)  # images x 2 x rows x weights; torch counts no scores on a CPU
    assert work["unpatched"] - work["section"] == layer
    assert work["section"] - work["first layer off"] == layer, "the second layer is the one that nobody reads"
    assert features.last_hidden_state.numel() == 0, "what was not computed is empty"
    vis_sparse.patch(model, with_tower())
    torch.testing.assert_close(run(model, batch)[0], expected, atol=1e-5, rtol=0)
    whole = model.model.vision_tower(batch.pixel_values, output_hidden_states=True)
    vis_sparse.unpatch(model)
    plain = model.model.vision_tower(batch.pixel_values, output_hidden_states=True)
    torch.testing.assert_close(whole.last_hidden_state, plain.last_hidden_state, atol=1e-5, rtol=0)
    for own, right in zip(whole.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(own, right, atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_plan_has_its_own_tower():
    model = small_model()
    batch = batch_of(model)
    plain = run(model, batch)[0]
    plans = {"cut": with_tower(NEAR, NEAR), "dense": VisualPlan.dense(LAYERS), "off": with_tower(LayerPlan.off(), NEAR)}
    alone = {}
    for name, plan in plans.items():
        alone[name] = run(vis_sparse.patch(model, plan), batch)[0]
    torch.testing.assert_close(alone["dense"], plain, atol=1e-5, rtol=0)
    assert (alone["cut"] - alone["off"]).abs().max() > 1e-3
    vis_sparse.patch(model, plans)
    torch.testing.assert_close(run(model, batch)[0], alone["cut"], **EXACT)
    for name in plans:
        with vis_sparse.use_plan(model, name):
            torch.testing.assert_close(run(model, batch)[0], alone[name], **EXACT)
        vis_sparse_plan = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        made = model.generate(**batch.to_generate(), vis_sparse_plan=name, **vis_sparse_plan)
        torch.testing.assert_close(made.logits[0], alone[name][:, -1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_later_turn_runs_under_the_plan_of_its_cache():
    model = small_model()
    batch = make_batch(model, [(5, IMAGE, 4)])
    vis_sparse.patch(model, {"dense": "dense", "off": with_tower(LayerPlan.off(), NEAR)})
    with vis_sparse.use_plan(model, "off"):
        cache = model(**batch.by_ids(), use_cache=True).past_key_values
        expected = model(
            **batch.by_ids() | {"position_ids": None, "attention_mask": None}, past_key_values=copy.deepcopy(cache)
        )
    again = model(**batch.by_ids() | {"position_ids": None, "attention_mask": None}, past_key_values=cache)
    torch.testing.assert_close(again.logits, expected.logits, **EXACT)


@torch.no_grad()
def test_copies_and_checkpoints_bring_the_section(tmp_path):
    model, plan = small_model(), with_tower(NEAR, LayerPlan(ffn=(0, 3, 31)))
    batch = batch_of(model)
    expected = run(vis_sparse.patch(model, plan), batch)[0]
    torch.testing.assert_close(run(copy.deepcopy(model), batch)[0], expected, **EXACT)
    model.save_pretrained(tmp_path)
    again = vis_sparse.patch(type(model).from_pretrained(tmp_path))
    assert vis_sparse.inspect(again)["plan"] == plan
    torch.testing.assert_close(run(again, batch)[0], expected, **EXACT)


@torch.no_grad()
def test_weights_are_what_they_are_now():
    model = small_model()
    batch = batch_of(model)
    plan = with_tower(LayerPlan(ffn=tuple(range(0, 32, 2)), heads=(False, True)), NEAR)
    vis_sparse.patch(model, plan)
    before = run(model, batch)[0]
    assert vis_sparse.inspect(model)["extra_bytes"] > 0
    for parameter in model.model.vision_tower.parameters():
        parameter.data = parameter.data * 1.5
    moved = run(model, batch)[0]
    assert (moved - before).abs().max() > 1e-3
    torch.testing.assert_close(moved, run(vis_sparse.patch(model, plan), batch)[0], **EXACT)
    model.double()
    vis_sparse.unpatch(model)


def test_training_reaches_the_tower():
    model = small_model(torch.float64)
    batch = batch_of(model)
    vis_sparse.patch(model, with_tower(NEAR, NEAR))
    model(**batch.by_ids()).logits.pow(2).mean().backward()
    first, behind = model.model.vision_tower.encoder.layers
    assert first.mlp.fc1.weight.grad[:16].abs().min() > 0 and first.self_attn.q_proj.weight.grad.abs().max() > 0
    assert behind.mlp.fc1.weight.grad is None, "nobody reads the layer behind the feature layer"


def test_what_a_tower_refuses():
    model = small_model()
    batch = batch_of(model)
    tower = model.model.vision_tower
    with pytest.raises(
        PlanError, match=re.escape("plan 'towered': plan 'tower': got 3 layers, expected the model's 2")
    ):
        vis_sparse.patch(model, with_tower(*[LayerPlan()] * 3))
    assert vis_sparse.inspect(model) is None
    vis_sparse.patch(model, with_tower(NEAR, NEAR))
    with pytest.raises(PatchError, match="output_attentions: got True of a vision tower"):
        tower(batch.pixel_values, output_attentions=True)
    with pytest.raises(PatchError, match="got a call of layer 1 alone"):
        tower.encoder.layers[1](torch.zeros(1, 17, 32), None)
    model.train()
    tower.encoder.layers[0].gradient_checkpointing = True
    with pytest.raises(PatchError, match="got gradient checkpointing under a plan's tower section"):
        model(**batch.by_ids())
    tower.encoder.layers[0].gradient_checkpointing = False
    tower.encoder.layers[0] = copy.deepcopy(tower.encoder.layers[1])
    with pytest.raises(PatchError, match="got other layers than at vis_sparse.patch"):
        model(**batch.by_ids())
    vis_sparse.unpatch(model)
    tower.config.attention_dropout = 0.1
    with pytest.raises(PatchError, match="CLIPVisionModel: got attention_dropout=0.1, expected 0"):
        vis_sparse.patch(model, with_tower())
    tower.config.attention_dropout = 0.0
    blocks_of(vis_sparse.patches.llava.TOWERS[0], tower)[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(PatchError, match="got mlp.extra.weight in layer 0"):
        vis_sparse.patch(model, with_tower())


def test_an_encoder_that_no_kind_knows_is_named():
    model = small_model()
    model.model.vision_tower = torch.nn.Linear(2, 2)
    with pytest.raises(
        PatchError, match=re.escape("with Linear, expected an encoder of CLIPVisionModel, SiglipVisionModel")
    ):
        vis_sparse.patch(model, with_tower())
    assert vis_sparse.inspect(model) is None
