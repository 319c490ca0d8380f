"""Measured scores: their file, votes, masks, and the heads and neurons that budgets keep by them."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import vis_sparse
from vis_sparse.calibration.measure import calibrate
from vis_sparse.plans.budgets import load_heads, resolve_heads
from vis_sparse.plans.layer_plan import HeadBudget, LayerPlan, NeuronBudget, PlanError
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.scores import Calibration, keep_heads

from ..calibration.samples import make_samples
from ..models import HEADS, LAYERS, NEURONS, make_model


def test_votes_are_of_samples_and_the_majority_decides():
    ratios = np.array([[[0.3, 0.1, 0.2]] * 3, [[0.3, 0.1, 0.0]] * 3, [[0.0, 0.3, 0.2]] * 3], dtype=np.float32)
    model = make_model()
    result = calibrate(model, make_samples(model))
    result = Calibration(**{**vars(result), "ratios": ratios})
    assert result.votes(0.2).tolist() == (ratios > 0.2).tolist()
    assert result.elected(0.2).tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    assert result.elected(0.15, whole=()).tolist() == [[True, False, True]] * 3


def test_the_file_is_what_patch_takes_for_head_scores(tmp_path):
    model = make_model()
    result = calibrate(model, make_samples(model), out=tmp_path / "a.safetensors", data="random")
    loaded = Calibration.load(tmp_path / "a.safetensors")
    for name in ("heads", "ratios", "text_mass", "attention_change", "ffn_change", "neurons"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(result, name))
    assert loaded.metadata == result.metadata and loaded.metadata["data"] == "random"
    np.testing.assert_array_equal(load_heads(tmp_path / "a.safetensors"), result.heads)
    assert result.heads.shape == (LAYERS, HEADS) and result.heads.dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_another_file_is_refused(tmp_path):
    save_file({"heads": np.ones((2, 4), np.float32)}, tmp_path / "heads.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("heads.safetensors", "text.safetensors", "none.safetensors"):
        with pytest.raises(PlanError, match=f"calibration: .*{name}: expected a file that calibrate wrote"):
            Calibration.load(tmp_path / name)


SCORES = np.array([[0.1, 0.45, 0.2, 0.3], [0.9, 0.8, 0.1, 0.7], [0.0, 0.05, 0.6, 0.5]], dtype=np.float32)


def kept(masks):
    return [[index for index, active in enumerate(mask) if active] for mask in masks]


@pytest.mark.parametrize(
    ("budget", "kv_heads", "expected"),
    [
        (HeadBudget(0.5), 4, [[1, 3], [0, 1], [2, 3]]),
        (HeadBudget(0.5, over="model"), 4, [[1], [0, 1, 3], [2, 3]]),
        (HeadBudget(1, over="model"), 4, [[], [0, 1, 3], []]),
        (HeadBudget(0.5, by="group"), 2, [[0, 1], [0, 1], [2, 3]]),
        (HeadBudget(2, by="group", over="model"), 2, [[], [0, 1, 2, 3], [2, 3]]),
    ],
)
def test_budgets_keep_the_best_scores(budget, kv_heads, expected):
    assert kept(keep_heads(SCORES, budget, kv_heads)) == expected


def test_a_plan_with_budgets_is_resolved_from_a_calibration(tmp_path):
    model = make_model()
    result = calibrate(model, make_samples(model), out=tmp_path / "a.safetensors")
    budgets = VisualPlan((LayerPlan(), LayerPlan(heads=HeadBudget(3), ffn=NeuronBudget(0.25)), LayerPlan(ffn=0.5)))
    heads = np.sort(np.argsort(-result.heads[1])[:3]).tolist()
    neurons = tuple(np.sort(np.argsort(-result.neurons[1])[: NEURONS // 4]).tolist())
    for calibration in (result, tmp_path / "a.safetensors"):
        with vis_sparse.patched(model, budgets, calibration=calibration):
            layers = vis_sparse.inspect(model)["plan"].layers
        assert kept([layers[1].heads]) == [heads]
        assert [layer.ffn for layer in layers] == [1.0, neurons, 0.5]
    assert VisualPlan.from_yaml(budgets.to_yaml()) == budgets
    with pytest.raises(PlanError, match="layer 1: ffn: got the budget {keep: 0.25} and no neuron importance"):
        vis_sparse.patch(model, budgets, heads=result.heads)
    with pytest.raises(PlanError, match="calibration: got 3 layers, expected 2"):
        resolve_heads(VisualPlan((LayerPlan(ffn=NeuronBudget(1)),) * 2), HEADS, HEADS, "first", result)


def test_first_neurons_stand_in_for_counting():
    plan = VisualPlan((LayerPlan(ffn=NeuronBudget(0.25)), LayerPlan(ffn=NeuronBudget(3))))
    assert [layer.ffn for layer in resolve_heads(plan, HEADS, HEADS, "first").layers] == [0.25, (0, 1, 2)]
    with pytest.raises(PlanError, match=r"ffn.keep: got 49, expected at most the model's 48 neurons"):
        VisualPlan((LayerPlan(ffn=NeuronBudget(49)),)).check_fits(1, HEADS, NEURONS)
    with pytest.raises(PlanError, match="expected neurons"):
        plan.layers[0].neurons(NEURONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{heads: {keep: 2, by: pair}}", "heads.by: got 'pair', expected head or group"),
        ("{heads: {keep: 2, over: all}}", "heads.over: got 'all', expected layer or model"),
        ("{ffn: {keep: 1.5}}", "ffn.keep: got 1.5"),
        ("{ffn: {file: a}}", "layers 0: ffn: got unknown key 'file'"),
        ("{ffn: {}}", "layers 0: ffn: keep is missing"),
    ],
)
def test_malformed_budgets_are_refused(text, message):
    with pytest.raises(PlanError, match=message):
        VisualPlan.from_yaml(f"layers: {{0: {text}}}\n", 1)


def test_masks_in_the_official_format(tmp_path):
    model = make_model()
    result = calibrate(model, make_samples(model))
    masks = result.masks(0.25)
    assert masks[:2].all() and masks[2].sum() == HEADS // 4
    np.save(tmp_path / "heads.npy", masks)
    plan = resolve_heads(VisualPlan.dense(LAYERS), HEADS, HEADS, tmp_path / "heads.npy")
    assert [layer.heads for layer in plan.layers] == [tuple(mask) for mask in masks.tolist()]
    assert result.masks(2, over="layer", whole=()).sum(1).tolist() == [2] * LAYERS
