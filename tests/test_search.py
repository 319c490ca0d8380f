"""Search: what probes measure against the patched model, the way down to a budget, and the front's files."""

import base64
import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vis_sparse
from vis_sparse.calibration import calibrate
from vis_sparse.calibration.front import described, pareto, write_front
from vis_sparse.calibration.probe import Probe
from vis_sparse.calibration.profiles import Target
from vis_sparse.calibration.report import write_report
from vis_sparse.calibration.samples import answer_rows
from vis_sparse.calibration.search import Point, search_front
from vis_sparse.cost import flops
from vis_sparse.plan import LayerPlan, Neighborhood, PlanError, VisualPlan, with_layer
from vis_sparse.shapes import shape_of

from .models import IMAGE, LAYERS, make_model, random_plan
from .test_calibration import make_sample, make_samples

DROPPED = VisualPlan((LayerPlan(), LayerPlan(attention=Neighborhood(1), ffn=0.5), LayerPlan.off()))


@pytest.fixture(scope="module")
def model():
    return make_model("llama-gqa")


@pytest.fixture(scope="module")
def samples(model):
    return make_samples(model, 5)


def answer_log_probs(model, sample):
    with torch.no_grad():
        logits = model(**{name: value for name, value in sample.items() if name != "labels"}).logits
    return logits[0, answer_rows(sample)].log_softmax(-1)


def divergence(model, samples, plan):
    """KL(dense || plan) from one call of the patched model for each sample."""
    total = 0
    for sample in samples:
        dense = answer_log_probs(model, sample)
        with vis_sparse.patched(model, plan):
            reduced = answer_log_probs(model, sample)
        total += float((dense.exp() * (dense - reduced)).sum(-1).mean())
    return total / len(samples)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("plan", [DROPPED, random_plan(0), random_plan(1)], ids=["dropped", "random-0", "random-1"])
def test_divergence_is_that_of_the_patched_model(model, samples, plan, batch):
    probe = Probe(Target.of(model), samples, batch)
    assert probe.divergence(plan) == pytest.approx(divergence(model, samples, plan), rel=1e-4)
    assert probe.divergence(probe.plan) == pytest.approx(0, abs=1e-6)


def test_a_step_goes_on_from_the_adopted_plan(model, samples):
    probe, fresh = Probe(Target.of(model), samples), Probe(Target.of(model), samples)
    probe.adopt(with_layer(probe.plan, 2, LayerPlan.off()))
    probe.adopt(DROPPED)
    assert probe.first_change(DROPPED) == LAYERS
    assert probe.divergence(DROPPED) == pytest.approx(fresh.divergence(DROPPED), rel=1e-5)
    further = with_layer(DROPPED, 1, LayerPlan(attention="none", ffn=0.0))
    assert probe.divergence(further) == pytest.approx(fresh.divergence(further), rel=1e-5)


def test_accuracy_is_of_whole_answers(model):
    right = make_sample(model, answer=3)
    for row in answer_rows(right).tolist():
        with torch.no_grad():
            logits = model(**{name: value for name, value in right.items() if name != "labels"}).logits[0, row]
        right["input_ids"][0, row + 1] = right["labels"][0, row + 1] = logits.argmax()
    wrong = {name: value.clone() for name, value in right.items()}
    wrong["labels"][0, -1] = (wrong["labels"][0, -1] + 1) % 90
    probe = Probe(Target.of(model), [right, wrong, right, right])
    assert probe.accuracy(probe.plan) == 0.75


def test_the_way_to_a_budget_is_measured_and_counted(model, samples):
    points = list(search_front(model, samples, budget=0.3))
    costs = [point.cost for point in points]
    assert costs[0] == 1 and costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    assert costs[-1] <= 0.3 < costs[-2]
    probe, shape = Probe(Target.of(model), samples), shape_of(model)
    middle = int(np.argsort(probe.lengths, kind="stable")[len(samples) // 2])
    layout = probe.layouts[middle]

    def visual(plan):
        text = probe.lengths[middle] - layout.num_visual
        return flops(shape, plan, layout=layout, text_tokens=text).prefill.lane("visual")

    for point in points:
        assert point.cost == visual(point.plan) / visual(VisualPlan.dense(LAYERS))
        assert point.kl == pytest.approx(probe.divergence(point.plan), rel=1e-4, abs=1e-7)
    assert vis_sparse.search(model, samples, budget=0.3) == points[-1].plan


def test_a_step_is_the_cheapest_loss_for_what_it_saves(model, samples):
    sample = samples[:1]
    points = search_front(model, sample, budget=0.5)
    before, after = [next(points) for _ in range(3)][1:]  # the first step is free: nobody reads the last layer's rows
    probe, shape = Probe(Target.of(model), sample), shape_of(model)
    layout, length = probe.layouts[0], probe.lengths[0]
    assert before.kl == 0 < after.kl

    def visual(plan):
        return flops(shape, plan, layout=layout, text_tokens=length - layout.num_visual).prefill.lane("visual")

    def rate(plan):
        return probe.divergence(plan) / (visual(before.plan) - visual(plan))

    rivals = [
        with_layer(before.plan, index, replace(layer, **change))
        for index, layer in enumerate(before.plan.layers)
        for change in ({"attention": "none"}, {"ffn": 0.0}, {"text_reads": False})
    ]
    saving = [plan for plan in rivals if visual(plan) < visual(before.plan)]
    assert len(saving) > 3
    assert rate(after.plan) <= min(map(rate, saving)) * (1 + 1e-4)


def test_other_costs_and_objectives(model, samples):
    cached = list(search_front(model, samples[:2], budget=0.5, cost="kv", objective="accuracy"))[-1]
    assert cached.cost <= 0.5
    prefill = list(search_front(model, samples[:2], budget=0.9, cost="prefill", time_limit=0))[-1]
    assert prefill.cost <= 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget: got 0, expected a share"),
        ({"cost": "time"}, "cost: got 'time', expected one of visual, prefill, kv"),
        ({"objective": "loss"}, "objective: got 'loss', expected one of kl, accuracy"),
        ({"budget": 0.01, "cost": "prefill"}, "budget: got 0.01, expected at least 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(model, samples, settings, message):
    with pytest.raises(PlanError, match=message):
        list(search_front(model, samples[:1], **settings))


def test_the_front_is_what_no_cheaper_plan_beats(tmp_path):
    plans = [VisualPlan((LayerPlan(ffn=share),)) for share in (1.0, 0.75, 0.5, 0.25)]
    points = [Point(plan, cost, kl, 1.0) for plan, cost, kl in zip(plans, (1, 0.8, 0.6, 0.4), (0, 0.3, 0.1, 0.2))]
    assert [point.cost for point in pareto(points)] == [1, 0.6, 0.4]
    write_front(tmp_path / "front", points, "visual")
    rows = list(csv.DictReader((tmp_path / "front" / "front.csv").open()))
    assert [float(row["visual_share"]) for row in rows] == [1, 0.6, 0.4]
    for row, point in zip(rows, pareto(points), strict=True):
        assert VisualPlan.from_yaml(tmp_path / "front" / row["plan"]) == described(point, "visual")


def test_samples_of_different_pixels_are_separate_calls(model):
    samples = [make_sample(model, (3, IMAGE, 4)), make_sample(model, (3, IMAGE, IMAGE, 4), seed=2)]
    assert Probe(Target.of(model), samples).divergence(DROPPED) == pytest.approx(
        divergence(model, samples, DROPPED), rel=1e-4
    )


def test_the_page_holds_its_pictures(model, samples, tmp_path):
    measured = calibrate(model, samples[:2], sensitivity=True)
    points = [Point(VisualPlan.dense(1), 1.0, 0.0, 1.0), Point(VisualPlan.dense(1), 0.5, 0.1, 1.0)]
    files = write_report(tmp_path / "a.html", measured, points)
    assert [file.name for file in files] == ["a-heads.png", "a-layers.png", "a-front.png"]
    text = (tmp_path / "a.html").read_text()
    for file in files:
        width, height = Image.open(file).size
        assert width > 400 and height > 200
        assert base64.b64encode(file.read_bytes()).decode() in text
    assert measured.metadata["weights"] in text and "http" not in text
