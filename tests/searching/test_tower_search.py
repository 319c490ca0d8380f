"""Search over vision encoder and decoder together: what it changes, counts, times and refuses."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import vis_sparse
from vis_sparse import LayerPlan, PlanError, VisualPlan
from vis_sparse.calibration.measure import calibrate
from vis_sparse.cli.main import app
from vis_sparse.cost.flops import flops
from vis_sparse.cost.shape_lookup import shape_of
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.plans.layer_plan import TokenBudget
from vis_sparse.plans.plan import with_layer
from vis_sparse.plans.scores import TowerScores
from vis_sparse.searching import layer_times
from vis_sparse.searching.changes import TOWER_ATTENTION, LayerChanges
from vis_sparse.searching.search import best_within, meter_of, search_front

from ..calibration.samples import make_samples
from ..models import LAYERS, make_model
from .test_search import divergence

WHOLE = VisualPlan.dense(LAYERS).replace(tower=VisualPlan.dense(2))


@pytest.fixture(scope="module")
def model():
    """Of a decoder so narrow that the encoder's share shows."""
    return make_model("llama-gqa", hidden_size=32, intermediate_size=32)


@pytest.fixture(scope="module")
def samples(model):
    return make_samples(model, 4)


@pytest.fixture(scope="module")
def points(model, samples):
    return list(search_front(model, samples[:2], budget=0.3, cost="all", time_limit=0))


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_it_ends_within_the_budget_and_measures_what_the_patched_model_does(model, samples, points):
    assert points[-1].cost <= 0.3 < min(point.cost for point in points[:-1])
    changed = {place for point in points for place in range(-2, LAYERS) if not _at(point.plan, place).is_dense}
    assert changed & {-2, -1} and changed & set(range(LAYERS)), "both are changed on the way"
    for point in points[:: len(points) // 4]:
        assert point.kl == pytest.approx(divergence(model, samples[:2], point.plan), rel=1e-3, abs=1e-6)
    best = best_within(points, 0.3).plan
    assert VisualPlan.from_yaml(best.to_yaml()) == best and best.tower.num_layers == 2


def _at(plan, place):
    return plan.layers[place] if place >= 0 else plan.tower.layers[place]


def test_costs_are_those_of_the_patched_model(model, samples, points):
    """Shares of the unpatched model, in whose encoder the layer behind the feature layer runs too."""
    meter, shape = meter_of(model, samples[:2], "all"), shape_of(model)
    assert points[0].plan.tower.is_dense and points[0].cost < 1, "nobody reads the last layer"
    for plan in (WHOLE, points[-1].plan, with_layer(WHOLE, -2, LayerPlan.off())):
        report, images = flops(shape, plan), meter._probe.grids
        dense = flops(shape, "dense")
        layout = meter._probe.layouts[1]
        visual, whole = (
            flops(shape, each, layout=layout, text_tokens=10).prefill.lane("visual") for each in (plan, "dense")
        )
        count = len(layout.segments)
        expected = (visual + count * report.prefill.vision_tower) / (whole + count * dense.prefill.vision_tower)
        assert meter.cost(plan) == pytest.approx(expected, rel=1e-9)
        assert len(images) == sum(len(each.segments) for each in meter._probe.layouts)


def test_changes_of_the_encoder():
    rng = np.random.default_rng(0)
    tower = TowerScores(rng.random((3, 4)), rng.random((3, 20)))
    scores = SimpleNamespace(heads=rng.random((2, 8)), neurons=rng.random((2, 20)), tower=tower)
    changes = LayerChanges(scores, 8, with_tower=True)
    plan = VisualPlan.dense(2).replace(tower=VisualPlan.dense(3))
    found = list(changes.of(plan))
    assert {place for place, _ in found} == {-3, -2, -1, 0, 1}
    for place, layer in found:
        with_layer(plan, place, layer)  # a plan, whatever is changed
    layers = [layer for place, layer in found if place == -2]
    assert len(layers) == len(set(layers)) and LayerPlan() not in layers
    assert {layer.attention for layer in layers} == set(TOWER_ATTENTION)
    assert LayerPlan.off() in layers and LayerPlan(tokens=TokenBudget(0.5, "norm")) in layers
    best = np.sort(np.argsort(-tower.neurons[1])[:10]).tolist()
    assert LayerPlan(ffn=tuple(best)) in layers
    assert LayerPlan(heads=tuple((tower.heads[1] >= np.sort(tower.heads[1])[-2]).tolist())) in layers
    back = [layer for place, layer in changes.of(with_layer(plan, -2, LayerPlan.off())) if place == -2]
    assert LayerPlan() in back and LayerPlan(ffn=0.0) in back and LayerPlan.off() not in back
    decoder = LayerChanges(scores, 8)
    assert [each for each in decoder.of(plan)] == [each for each in found if each[0] >= 0]


def test_layers_of_the_encoder_change_places_as_a_whole():
    rng = np.random.default_rng(0)
    tower = TowerScores(rng.random((3, 4)), rng.random((3, 20)))
    scores = SimpleNamespace(heads=rng.random((2, 8)), neurons=rng.random((2, 20)), tower=tower)
    changes = LayerChanges(scores, 8, with_tower=True)
    half = LayerPlan(ffn=tuple(range(10)), tokens=TokenBudget(0.5, "uniform"))
    plan = VisualPlan.dense(2).replace(tower=VisualPlan((LayerPlan.off(), LayerPlan(), half)))
    swaps = {tuple(place for place, _ in swap): swap for swap in changes.swaps(plan)}
    assert set(swaps) == {(-3, -2), (-3, -1), (-2, -1)}, "never a layer of the decoder, nor two that are alike"
    (_, first), (_, last) = swaps[-3, -1]
    best = tuple(np.sort(np.argsort(-tower.neurons[0])[:10]).tolist())
    assert (first, last) == (dataclasses.replace(half, ffn=best), LayerPlan.off())
    for swap in swaps.values():
        changed = plan
        for place, layer in swap:
            changed = with_layer(changed, place, layer)


def test_a_budget_of_time_counts_the_encoder(model, samples, monkeypatch):
    """With a clock that counts FLOPs, which are those of the patched encoder and decoder."""
    monkeypatch.setattr(layer_times, "_timed", flops_of)
    meter = meter_of(model, samples[:1], "all-time")
    half = with_layer(WHOLE, -2, LayerPlan(ffn=0.5))
    fewer = WHOLE.replace(tower=VisualPlan((LayerPlan(tokens=TokenBudget(0.5, "norm")), LayerPlan())))
    assert meter.cost(WHOLE) == 1 > meter.cost(half)
    # rows x width x (all projections and the FFN of 32 neurons, or half of it); the class token has the whole FFN
    saved = 2 * 16 * 32 * 2 * 16
    assert (meter._cost(WHOLE) - meter._cost(half)) == pytest.approx(saved, rel=1e-6)
    assert meter.cost(fewer) == 1, "nobody reads the layer behind the one where patches leave"
    points = list(search_front(model, samples[:2], budget=0.7, cost="all-time", time_limit=0))
    assert points[0].cost == 1 and points[-1].cost <= 0.7


def test_what_cannot_be_searched_is_refused(model, samples):
    calibration = calibrate(model, samples[:1])
    with pytest.raises(PlanError, match="calibration: got one without scores of the vision encoder, expected calibr"):
        next(search_front(model, samples[:1], cost="all", calibration=calibration))
    with pytest.raises(PlanError, match="budget: got 0.01, expected at least 0"):
        list(search_front(model, samples[:1], cost="all", budget=0.01, time_limit=0))


@pytest.mark.slow
def test_the_command_searches_both(tmp_path):
    out, scores = tmp_path / "plan.yaml", tmp_path / "a.safetensors"
    data = ["--model", str(checkpoint()), "--data", "tiny-train", "--samples", "2"]
    run = CliRunner().invoke(app, ["calibrate", *data, "--tower", "--out", str(scores), "--json", "-"])
    assert np.shape(json.loads(run.stdout)["tower_head_scores"]) == (4, 4)
    search = ["search", *data, "--cost", "all", "--budget", "0.8", "--time-limit", "0s", "--calibration", str(scores)]
    run = CliRunner().invoke(app, [*search, "--out", str(out), "--json", "-"], catch_exceptions=False)
    assert run.exit_code == 0
    front = json.loads(run.stdout)["front"]
    assert front[0]["cost"] == 1 and front[-1]["cost"] <= 0.8
    assert VisualPlan.from_yaml(out).tower.num_layers == 4 and vis_sparse.load_plan(out)
