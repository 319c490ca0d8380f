"""What a calibration measures in a vision encoder: against masked heads, hooks, and the patched model."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AttentionInterface

import vis_sparse
from vis_sparse import LayerPlan, Neighborhood, PatchError, PlanError, VisualPlan
from vis_sparse.calibration.measure import calibrate
from vis_sparse.calibration.probe import Probe
from vis_sparse.calibration.profiles import Target
from vis_sparse.calibration.samples import answer_rows, with_answer
from vis_sparse.calibration.vision import Vision
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.plans.layer_plan import HeadBudget, NeuronBudget, TokenBudget
from vis_sparse.plans.plan import with_layer
from vis_sparse.plans.scores import Calibration, TowerScores

from ..models import LAYERS, make_model
from ..patches.cases import CASES
from ..patches.scenarios import SCENARIOS, make_request
from .samples import make_samples

# class token and separate projections; fused projections and ragged grids; layer scale; windows and a gated FFN
NAMES = ("Llava", "Qwen2VL", "InternVL (Qwen2)", "Qwen2.5VL")


@cache
def case_of(name):
    """A model of the family in float64, and one sample of two images for it."""
    case = next(case for case in CASES if case.name == name)
    model = case.build(torch.float64)
    inputs = make_request(case, SCENARIOS["two images"], torch.float64).inputs
    return model, with_answer(inputs, torch.tensor([7, 11]))


def log_probability(model, sample):
    rows = answer_rows(sample)
    with torch.no_grad():
        logits = model(**{name: value for name, value in sample.items() if name != "labels"}).logits[0, rows]
    return float(logits.log_softmax(-1).gather(1, sample["labels"][0, rows + 1][:, None]).sum())


def masked(vision, gates):
    """Attention by whole matrices, each head's scaled by a gate; class tokens read themselves for the rest."""
    places = {}
    for index, layer in enumerate(vision.tower.layers):
        owner, _ = layer.parts["output"]
        places[id(owner)] = index

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        dense = (query @ key.transpose(2, 3) * scaling).softmax(-1) @ value
        alone = torch.zeros_like(dense)
        if vision.kind.has_globals:
            alone[:, :, 0] = value[:, :, 0]
        gate = gates[places[id(module)]][:, None, None]
        return (gate * dense + (1 - gate) * alone).transpose(1, 2).contiguous(), None

    return attention


@pytest.mark.parametrize("name", NAMES)
def test_head_scores_are_slopes_of_heads_masked_one_at_a_time(name):
    """Central differences of the answer's log-probability, on the unpatched encoder."""
    model, sample = case_of(name)
    vision = Vision.of(Target.of(model))
    scores = calibrate(model, [sample], tower=True).tower.heads
    gates = torch.full(scores.shape, 0.5, dtype=torch.float64)
    AttentionInterface.register("masked", masked(vision, gates))
    config, before = vision.module.config, vision.module.config._attn_implementation
    slopes = np.zeros(scores.shape)
    try:
        config._attn_implementation = "masked"
        for place in np.ndindex(scores.shape):
            for more in (1e-3, -1e-3):
                gates[place] = 0.5 + more
                slopes[place] += np.sign(more) * log_probability(model, sample)
            gates[place] = 0.5
    finally:
        config._attn_implementation = before
    squares = slopes**2
    np.testing.assert_allclose(scores, squares / squares.sum(), rtol=1e-2, atol=1e-5)  # norms are in fp32
    assert scores.max() < 0.999 and (scores > 0).sum() > 1


@pytest.mark.parametrize("name", NAMES)
def test_neurons_are_weighed_by_what_they_add(name):
    model, sample = case_of(name)
    vision = Vision.of(Target.of(model))
    found = calibrate(model, [sample], tower=True).tower.neurons
    seen = []
    layer = vision.tower.layers[1]
    handle = layer.module("down").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    log_probability(model, sample)
    handle.remove()
    rows = seen[0][:, 1:] if vision.kind.has_globals else seen[0]  # no class token
    added = layer.module("down").weight.detach()
    if vision.kind.scales:
        added = added * layer.scale_of(1).detach()[:, None]
    np.testing.assert_allclose(found[1], rows.flatten(0, -2).abs().mean(0) * added.norm(dim=0), rtol=1e-5)


def random_plan(vision, layers, seed):
    rng = np.random.default_rng(seed)
    tower, heads = [], vision.tower.num_heads
    for _ in vision.tower.layers:
        near = Neighborhood(int(rng.integers(1, 3)), "both")
        attention = rng.choice(np.array(["full", near, Neighborhood(0, "both", stride=2)], dtype=object))
        tokens = TokenBudget(0.6, str(rng.choice(["norm", "uniform"]))) if rng.random() < 0.5 else None
        mask = (True, *(rng.random(heads - 1) < 0.6).tolist())
        tower.append(LayerPlan(True, attention, mask, float(rng.choice([0.5, 1])), tokens))
    plan = with_layer(VisualPlan.dense(layers), 1, LayerPlan(attention=Neighborhood(1), ffn=0.5))
    return plan.replace(tower=VisualPlan(tuple(tower)))


def divergence(model, sample, plan):
    rows, inputs = answer_rows(sample), {name: value for name, value in sample.items() if name != "labels"}
    with torch.no_grad():
        dense = model(**inputs).logits[0, rows].log_softmax(-1)
        with vis_sparse.patched(model, plan):
            reduced = model(**inputs).logits[0, rows].log_softmax(-1)
    return float((dense.exp() * (dense - reduced)).sum(-1).mean())


@pytest.mark.parametrize("name", [*NAMES, "Qwen3VL", "LlavaNext"])
def test_what_a_probe_measures_is_what_the_patched_model_does(name):
    """From dense, and from a plan that was adopted; DeepStack and tiles of several sizes too."""
    model, sample = case_of(name)
    vision, target = Vision.of(Target.of(model)), Target.of(model)
    probe, layers = Probe(target, [sample], vision=vision), len(target.decoder.layers)
    assert probe.divergence(probe.plan) == pytest.approx(0, abs=1e-6)
    plan = random_plan(vision, layers, 3)
    further = with_layer(plan, -1, LayerPlan(ffn=0.5))
    expected = [divergence(model, sample, each) for each in (plan, further)]
    assert expected[0] > 1e-6
    assert probe.divergence(plan) == pytest.approx(expected[0], rel=1e-4, abs=1e-9)
    probe.adopt(plan)
    assert probe.divergence(plan) == pytest.approx(expected[0], rel=1e-4, abs=1e-9)
    assert probe.divergence(further) == pytest.approx(expected[1], rel=1e-4, abs=1e-9)
    probe.adopt(VisualPlan.dense(layers))
    assert probe.divergence(VisualPlan.dense(layers)) == pytest.approx(0, abs=1e-6)


def test_sensitivity_is_the_divergence_of_one_reduced_layer():
    model, sample = case_of("Qwen2VL")
    result = calibrate(model, [sample], tower=True, sensitivity=True)
    depth = len(Vision.of(Target.of(model)).tower.layers)
    dense = VisualPlan.dense(len(result.heads)).replace(tower=VisualPlan.dense(depth))
    reductions = (LayerPlan.off(), LayerPlan(attention=Neighborhood(2, "both")), LayerPlan(ffn=0.0))
    expected = [[divergence(model, sample, with_layer(dense, place - depth, each)) for each in reductions]
                for place in range(depth)]  # fmt: skip
    np.testing.assert_allclose(result.tower.sensitivity, expected, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(result.sensitivity, calibrate(model, [sample], sensitivity=True).sensitivity, rtol=1e-5)


def test_the_decoders_numbers_do_not_depend_on_the_tower(tmp_path):
    """And the model is left as it was; what was saved comes back, and without a tower nothing of one is there."""
    model = make_model(dtype=torch.float32)
    samples = make_samples(model, 2)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    both, alone = (calibrate(model, samples, tower=tower, out=tmp_path / str(tower)) for tower in (True, False))
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: attributes.keys() for name, attributes in before.items()
    }
    for name in ("heads", "mass", "effects", "ratios", "neurons", "attention_change"):
        np.testing.assert_array_equal(getattr(both, name), getattr(alone, name))
    again = Calibration.load(tmp_path / "True")
    np.testing.assert_array_equal(again.tower.heads, both.tower.heads)
    np.testing.assert_array_equal(again.tower.neurons, both.tower.neurons)
    assert again.metadata == both.metadata and again.metadata["tower class"] == "CLIPVisionModel"
    assert again.tower.sensitivity is None
    assert alone.tower is None and Calibration.load(tmp_path / "False").tower is None


def test_old_files_load(tmp_path):
    """As calibrations were written before they knew towers."""
    with safe_open(checkpoint() / "heads.safetensors", "np") as shipped:
        metadata = shipped.metadata()
    tensors = load_file(checkpoint() / "heads.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("tower")}
    assert len(own) < len(tensors)
    save_file(own, tmp_path / "old.safetensors", metadata=metadata)
    assert Calibration.load(tmp_path / "old.safetensors").tower is None


@pytest.fixture(scope="module")
def measured():
    model = make_model(dtype=torch.float32)
    return model, calibrate(model, make_samples(model, 2), tower=True)


def test_budgets_of_a_section_are_resolved_by_the_encoders_scores(measured):
    model, calibration = measured
    section = VisualPlan((LayerPlan(), LayerPlan(heads=HeadBudget(0.5), ffn=NeuronBudget(0.25))))
    plan = VisualPlan.dense(LAYERS).replace(tower=section)
    best, neurons = int(calibration.tower.heads[1].argmax()), np.argsort(-calibration.tower.neurons[1])[:8]
    with vis_sparse.patched(model, plan, calibration=calibration):
        layer = vis_sparse.inspect(model)["plan"].tower.layers[1]
    assert layer.heads == tuple(index == best for index in range(2)) and layer.ffn == tuple(sorted(neurons.tolist()))
    for scores in (None, dataclasses.replace(calibration, tower=None)):
        with pytest.raises(PlanError, match="layer 1: heads: got the budget .* no scores of the vision encoder"):
            vis_sparse.patch(model, plan, calibration=scores)
    assert vis_sparse.inspect(model) is None


def test_scores_of_another_encoder(measured):
    model, calibration = measured
    plan = VisualPlan.dense(LAYERS).replace(tower=VisualPlan.dense(2))
    small = TowerScores(calibration.tower.heads[:1], calibration.tower.neurons[:1])
    with pytest.raises(PlanError, match=r"calibration: tower: got \(1, 2, 32\) layers, heads and neurons, expected"):
        vis_sparse.patch(model, plan, calibration=dataclasses.replace(calibration, tower=small))
    other = dataclasses.replace(calibration, metadata=calibration.metadata | {"tower class": "Other"})
    with pytest.raises(PlanError, match="calibration: tower: got those of a Other.*, expected those of a CLIPVision"):
        vis_sparse.patch(model, plan, calibration=other)
    tuned = make_model(dtype=torch.float32)
    tuned.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data += 1
    with pytest.warns(UserWarning, match="calibration: tower: got those of a CLIPVisionModel with other weights"):
        vis_sparse.patch(tuned, plan, calibration=calibration)


def test_a_family_without_a_known_encoder_is_refused():
    model, sample = case_of("Llava")
    target = Target.of(model)
    bare = dataclasses.replace(target, family=dataclasses.replace(target.family, towers=()))
    with pytest.raises(PatchError, match="calibration: tower: got a LlavaModel with no encoder that it knows"):
        Vision.of(bare)
    with pytest.raises(PlanError, match="tower: got a section, expected none"):
        Probe(target, [sample]).divergence(VisualPlan.dense(LAYERS).replace(tower=VisualPlan.dense(2)))
