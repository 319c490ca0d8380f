"""`fit`: a ridge regression by another solver gives the same weights, a repaired plan is nearer to the dense model, and
the model stays as it was."""

import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import vis_sparse
from vis_sparse.calibration.fit import RIDGES, _layer_map, fit, of_rank
from vis_sparse.calibration.probe import LayerRows, Probe
from vis_sparse.calibration.profiles import Target
from vis_sparse.patches.errors import PatchError
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood, PlanError, TokenBudget
from vis_sparse.plans.plan import VisualPlan

from ..models import TEXT_MODELS, make_model
from .samples import make_sample, make_samples

STILL = LayerPlan(attention="none", ffn=0)


def still(layers=3, first=1) -> VisualPlan:
    """Visual rows that stand still from layer `first` on, and are read."""
    return VisualPlan(tuple(LayerPlan() if index < first else STILL for index in range(layers)), name="still")


def samples_of(model, number: int, seed: int = 0) -> list[dict]:
    return [make_sample(model, seed=seed + each) for each in range(number)]


def state(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_a_fitted_plan_is_nearer_to_the_dense_model(text):
    model = make_model(text, seed=3)
    before, held_out = state(model), samples_of(model, 8, seed=1000)
    dense = Probe(Target.of(model), held_out)
    fitted = fit(model, samples_of(model, 48), still())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(fitted.explained) == set(fitted.disturbed) == {2}  # what enters layers 0 and 1 is the dense rows
    assert 0 < fitted.explained[2] <= 1 and 0 < fitted.disturbed[2] < 1
    unfitted = dense.divergence(fitted.plan)
    fitted.add_to(model)  # `dense` has kept the answers of the model as it was
    assert dense.divergence(fitted.plan) < 0.8 * unfitted


def test_only_visual_keys_and_values_that_are_read_are_fitted():
    model = make_model("llama-gqa")
    plan = VisualPlan((LayerPlan(), STILL, dataclasses.replace(STILL, text_reads=False)), name="unread")
    assert fit(model, make_samples(model, 8), plan).differences == {}
    assert fit(model, make_samples(model, 8), VisualPlan.dense(3)).differences == {}
    found = fit(model, make_samples(model, 8), still()).differences
    assert sorted(name.split("layers.")[1] for name in found) == ["2.self_attn.k_proj", "2.self_attn.v_proj"]


@pytest.mark.parametrize("layer", [STILL, LayerPlan(attention=Neighborhood(1, "both"), ffn=0.5), LayerPlan(ffn=0)])
def test_a_walk_sees_what_enters_each_layer(layer):
    model = make_model("llama-gqa", num_hidden_layers=4)
    samples = make_samples(model, 4)
    plan = VisualPlan((layer, LayerPlan(), layer, LayerPlan(text_reads=False)), name="mixed")
    probe, adopted = (Probe(Target.of(model), samples, 2) for _ in range(2))
    dense = [list(batch.states) for batch in adopted._batches]
    adopted.adopt(plan)
    norms = [each.module("input_norm") for each in probe.target.decoder.layers]
    for index, (rows, norm) in enumerate(zip(probe.walk(plan), norms, strict=True)):
        for each, batch, states in zip(rows, adopted._batches, dense, strict=True):
            expected = LayerRows.of(batch, norm(states[index]), norm(batch.states[index]))
            for found, wanted in zip(each, expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def random_rows(generator, count=6, width=7) -> list[LayerRows]:
    def rows(number):
        return torch.randn(number, width, dtype=torch.float64, generator=generator)

    return [LayerRows(rows(9 + number), rows(9 + number), rows(4)) for number in range(count)]


def test_the_map_is_what_least_squares_gives():
    generator = torch.Generator().manual_seed(0)
    rows = random_rows(generator)
    weight = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    change, square, _, _ = _layer_map(rows, [weight])
    dense, visual, text = (torch.cat(parts).numpy() for parts in zip(*rows))
    share = (visual**2).sum() / (text**2).sum()
    solutions = []
    for ridge in RIDGES:
        gram = visual.T @ visual + share * text.T @ text
        held = np.sqrt(ridge * np.diag(gram).mean()) * np.eye(7)
        stacked = np.concatenate([visual, np.sqrt(share) * text, held])
        wanted = np.concatenate([dense - visual, np.zeros((len(text) + 7, 7))])
        solutions.append(np.linalg.lstsq(stacked, wanted, rcond=None)[0].T)
    errors = [np.abs(change.numpy() - solution).max() for solution in solutions]
    assert min(errors) < 1e-9 and sorted(errors)[1] > 1e-6
    np.testing.assert_allclose(square.numpy(), gram, atol=1e-9)


def test_a_low_rank_is_the_best_one():
    generator = torch.Generator().manual_seed(1)
    difference = torch.randn(6, 9, dtype=torch.float64, generator=generator)
    inputs = torch.randn(40, 9, dtype=torch.float64, generator=generator) * torch.arange(1, 10)
    a, b = of_rank(difference, inputs.T @ inputs, 2)
    assert a.shape == (2, 9) and b.shape == (6, 2)
    wanted = inputs @ difference.T
    found = (wanted - inputs @ (b @ a).T).norm() ** 2
    singular = torch.linalg.svdvals(wanted)
    torch.testing.assert_close(found, singular[2:].square().sum())
    a, b = of_rank(difference, inputs.T @ inputs, None)
    torch.testing.assert_close(b @ a, difference)


def test_an_adapter_carries_it_with_the_plan(tmp_path):
    model = make_model("qwen2-gqa", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base").eval()
    fitted = fit(model, samples_of(model, 12), still(), rank=4)
    assert fitted.explained == {2: None}  # two batches, of which none is left out
    assert all(a.shape == (4, 64) for a, _ in fitted.differences.values())
    before = state(model)
    fitted.save(tmp_path / "fitted", model)
    assert {*before} == {*model.state_dict()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded = vis_sparse.from_pretrained(tmp_path / "fitted")
    assert vis_sparse.inspect(loaded)["plan"] == still()
    fitted.add_to(model)
    vis_sparse.patch(model, still())
    inputs = {name: value for name, value in make_sample(model, seed=77).items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_refusals(tmp_path):
    model = make_model("llama-gqa")
    samples = make_samples(model, 4)
    before = state(model)
    leaves = VisualPlan((LayerPlan(tokens=TokenBudget(0.5)), LayerPlan(), LayerPlan()), name="leaves")
    with pytest.raises(PlanError, match="tokens"):
        fit(model, samples, leaves)
    with pytest.raises(PlanError, match="tower: got a section"):
        fit(model, samples, still().replace(tower=VisualPlan.dense(2)))
    with pytest.raises(PatchError, match="'dense': got no layer that reads other visual rows"):
        fit(model, samples, VisualPlan.dense(3)).save(tmp_path, model)
    with pytest.raises(PlanError, match="layers"):
        fit(model, samples, VisualPlan.dense(4))
    adapted = get_peft_model(make_model("llama-gqa"), LoraConfig(r=2, target_modules=["v_proj"])).base_model.model
    with pytest.raises(PatchError, match="layer 0: got .*peft.* for its values, expected a plain nn.Linear"):
        fit(adapted, samples, still())
    with vis_sparse.patched(model, "auto"), pytest.raises(PatchError, match="patched"):
        fit(model, samples, still())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
