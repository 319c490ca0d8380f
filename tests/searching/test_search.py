"""Search: what probes measure against the patched model, the way down to a budget, and the front's files."""

import base64
import csv
import itertools
import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import vis_sparse
from vis_sparse.calibration.measure import calibrate
from vis_sparse.calibration.probe import Probe
from vis_sparse.calibration.profiles import Target
from vis_sparse.calibration.records import SampleError
from vis_sparse.calibration.samples import answer_rows
from vis_sparse.cli.main import app
from vis_sparse.cost.flops import flops
from vis_sparse.cost.shape_lookup import load_shape, shape_of
from vis_sparse.eval.calibration_page import write_report
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood, PlanError
from vis_sparse.plans.plan import VisualPlan, with_layer
from vis_sparse.searching import layer_times
from vis_sparse.searching.changes import LayerChanges, WholeLayers
from vis_sparse.searching.log import Log
from vis_sparse.searching.pareto import Point, described, pareto, write_front
from vis_sparse.searching.plan_losses import PlanLosses
from vis_sparse.searching.published import chains
from vis_sparse.searching.search import (
    OBJECTIVES,
    _exchange,
    _stages,
    best_within,
    meter_of,
    points_to,
    search_front,
)

from ..calibration.samples import launch, make_sample, make_samples
from ..models import IMAGE, LAYERS, make_model, random_plan

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


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


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
    way = costs[: 1 + next(index for index, cost in enumerate(costs) if cost <= 0.3)]
    assert way[0] == 1 and way == sorted(way, reverse=True) and len(set(way)) == len(way) > 3
    probe, shape = Probe(Target.of(model), samples), shape_of(model)
    middle = int(np.argsort(probe.lengths, kind="stable")[len(samples) // 2])
    layout = probe.layouts[middle]

    def visual(plan):
        text = probe.lengths[middle] - layout.num_visual
        return flops(shape, plan, layout=layout, text_tokens=text).prefill.lane("visual")

    prompt = f"a prompt of {layout.num_visual} visual and {probe.lengths[middle] - layout.num_visual} text tokens"
    for point in points:
        assert prompt in described(point, "visual").about and prompt in point.plan.about
        assert point.cost == visual(point.plan) / visual(VisualPlan.dense(LAYERS))
        kl, accuracy = probe.measure(point.plan)
        assert point.kl == pytest.approx(kl, rel=1e-4, abs=1e-7) and point.accuracy == accuracy
    assert vis_sparse.search(model, samples, budget=0.3) == best_within(points, 0.3).plan


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_no_published_method_does_better_within_the_budget(model, samples, budget):
    points = list(search_front(model, samples, budget=budget))
    best, probe = best_within(points, budget), Probe(Target.of(model), samples)
    cost = meter_of(model, samples).cost
    scores, kv_heads = calibrate(model, samples).heads, shape_of(model).kv_heads
    methods = chains(scores, kv_heads, probe.divergence)
    assert set(methods) == {"YOPO, uniform", "VTW", "ViCA", "ShortV", "V-Skip"}
    rivals = [plan for plans in methods.values() for plan in plans if cost(plan) <= budget]
    assert len(rivals) > 10
    assert best.kl <= min(map(probe.divergence, rivals)) + 1e-6


def test_a_search_finds_on_its_way_what_one_for_half_the_cost_finds(model, samples):
    further, half = (list(search_front(model, samples[:2], budget=budget)) for budget in (0.3, 0.5))
    assert best_within(further, 0.5).kl <= best_within(half, 0.5).kl + 1e-6
    assert len({point.plan for point in further if point.cost <= 0.5}) > len({p.plan for p in half if p.cost <= 0.5})


@pytest.mark.parametrize(("budget", "stages"), [(1, [1]), (0.5, [0.5]), (0.25, [0.5, 0.25]), (0.12, [0.5, 0.25, 0.12])])
def test_exchanges_are_made_at_halvings_of_the_cost(budget, stages):
    assert _stages(budget) == stages


def test_an_exchange_ends_where_no_pair_of_moves_helps(model, samples):
    """From a poor plan within the budget to one that no single move improves."""
    probe = Probe(Target.of(model), samples)
    meter = PlanLosses(probe, lambda plan: sum(len(w.key_heads) + bool(w.neurons) for w in probe.work(plan)), Log())
    moves = LayerChanges(calibrate(model, samples), 4)
    poor = meter(VisualPlan((LayerPlan.off(), LayerPlan(attention="none"), LayerPlan(ffn=0.0))))
    found = list(_exchange(meter, moves, OBJECTIVES["kl"], poor, 0.7))
    losses = [poor.kl, *(point.kl for point in found)]
    assert len(losses) > 2 and losses == sorted(losses, reverse=True) and losses[-1] < poor.kl / 2
    assert all(point.cost <= 0.7 for point in found)
    for move in moves.of(found[-1].plan):
        plan = with_layer(found[-1].plan, *move)
        assert meter.cost(plan) > 0.7 or probe.divergence(plan) > losses[-1] - 2e-5


def test_a_search_over_whole_layers(model, samples):
    meter = meter_of(model, samples)
    ladder = WholeLayers(calibrate(model, samples), shape_of(model).kv_heads)
    points = list(points_to(0.4, meter, ladder, "a prompt"))
    kinds = {LayerPlan(), LayerPlan(attention="none", ffn=0.0), LayerPlan.off()}
    assert {layer for point in points for layer in point.plan.layers} <= kinds
    best = best_within(points, 0.4)
    plans = [VisualPlan(layers) for layers in itertools.product(kinds, repeat=LAYERS)]
    within = [meter(plan).kl for plan in plans if meter.cost(plan) <= 0.4]
    # of 27, a way down and exchanges may miss one
    assert best.kl <= sorted(within)[1] and "of a prompt" in best.plan.about


def test_moves_go_both_ways(model, samples):
    moves = LayerChanges(calibrate(model, samples), 4)
    dense, off = VisualPlan.dense(LAYERS), VisualPlan((LayerPlan.off(),) * LAYERS)
    down, up = list(moves.of_layer(dense, 1)), list(moves.of_layer(off, 1))
    assert LayerPlan.off() in down and LayerPlan(attention="none", ffn=0.0) in down
    assert LayerPlan() in up and LayerPlan(attention="none", ffn=0.0) in up
    for layer, options in ((LayerPlan(), down), (LayerPlan.off(), up)):
        assert layer not in options and len(set(options)) == len(options)
    important = np.argsort(-calibrate(model, samples).neurons[1])[:12]
    assert LayerPlan(ffn=tuple(sorted(important.tolist()))) in down


def test_near_layers_change_places():
    rng = np.random.default_rng(0)
    scores = SimpleNamespace(heads=rng.random((6, 8)), neurons=rng.random((6, 20)))
    moves = LayerChanges(scores, 8)

    def best(layer, heads, neurons):
        mask, kept = np.zeros(8, dtype=bool), np.argsort(-scores.neurons[layer])[:neurons]
        mask[np.argsort(-scores.heads[layer])[:heads]] = True
        return {"heads": tuple(mask.tolist()), "ffn": tuple(sorted(kept.tolist()))}

    busy = LayerPlan(attention=Neighborhood(2), **best(1, 3, 5))
    plan = VisualPlan((LayerPlan.off(), busy, *(LayerPlan.off(),) * 4))
    swaps = list(moves.swaps(plan))
    assert {tuple(index for index, _ in swap) for swap in swaps} == {(0, 1), (1, 2), (1, 3), (1, 4), (1, 5)}
    work = {"attention": Neighborhood(2), **best(4, 3, 5)}
    off, silent = LayerPlan.off(), replace(busy, text_reads=False)
    idle = replace(off, text_reads=True)
    expected = [((1, idle), (4, LayerPlan(text_reads=False, **work)))]
    expected += [((1, silent), (4, idle)), ((1, off), (4, LayerPlan(**work)))]
    assert [tuple(swap) for swap in swaps if swap[1][0] == 4] == expected
    far = VisualPlan((busy, *(LayerPlan.off(),) * 5))
    assert {swap[1][0] for swap in moves.swaps(far)} == {1, 2, 3, 4}


def test_an_exchange_moves_the_one_layer_that_is_read(model, samples):
    """Text reads in the wrong layer, and nothing may cost more."""
    probe = Probe(Target.of(model), samples)
    reads = [VisualPlan.vica(LAYERS, [layer]) for layer in range(LAYERS)]
    meter = PlanLosses(probe, lambda plan: sum(layer.text_reads for layer in plan.layers), Log())
    worst, best = (pick(map(meter, reads), key=lambda point: point.kl) for pick in (max, min))
    found = list(_exchange(meter, LayerChanges(calibrate(model, samples), 4), OBJECTIVES["kl"], worst, 1 / LAYERS))
    assert found[-1].kl <= best.kl < worst.kl and found[-1].cost <= 1 / LAYERS


@pytest.mark.parametrize(("kl", "exchanged"), [(0.9e-4, False), (1.1e-4, True)])
def test_what_is_as_good_as_dense_is_not_exchanged(model, samples, kl, exchanged):
    dense = VisualPlan.dense(LAYERS)

    class Meter:
        """Under which every other plan is better."""

        def start_from(self, plan):
            pass

        def cost(self, plan):
            return 1

        def __call__(self, plan, rough=False):
            return Point(plan, 1, kl if plan == dense else 0, 1)

    meter = Meter()
    found = _exchange(meter, LayerChanges(calibrate(model, samples[:1]), 4), OBJECTIVES["kl"], meter(dense), 1)
    assert bool(list(found)) is exchanged


def test_nothing_is_tried_when_the_time_is_up(model, samples, tmp_path):
    """But for the way down; what is known already is told."""
    limited, log = list(search_front(model, samples[:2], budget=0.5, time_limit=0, log=tmp_path / "a")), tmp_path / "b"
    assert limited[-1].cost <= 0.5 < min(point.cost for point in limited[:-1])
    whole = list(search_front(model, samples[:2], budget=0.5, log=log))
    assert list(search_front(model, samples[:2], budget=0.5, time_limit=1e-9, log=log))[-1] == whole[-1]


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_points(tmp_path):
    assert launch("search", tmp_path / "a", 4).returncode == -signal.SIGKILL
    before = (tmp_path / "a.log").read_text()
    (tmp_path / "a.log").write_text(before[:-7])  # and its last line cut off
    for name in ("a", "b"):
        assert launch("search", tmp_path / name).returncode == 0
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    known = before.splitlines()[:-1]
    assert len(known) > 20 and (tmp_path / "a.log").read_text().splitlines()[: len(known)] == known


def test_a_search_takes_what_its_log_holds(model, samples, tmp_path, monkeypatch):
    log = tmp_path / "log"
    first = list(search_front(model, samples[:2], budget=0.5, log=log))
    monkeypatch.setattr(Probe, "measure", None)  # nothing is measured again
    assert list(search_front(model, samples[:2], budget=0.5, log=log)) == first
    with pytest.raises(SampleError, match="log: .* is of a search with another samples"):
        next(search_front(model, samples[:3], log=log))
    with pytest.raises(SampleError, match="log: .* is of a search with another weights"):
        next(search_front(make_model("llama-gqa", seed=1), samples[:2], log=log))
    log.write_text("no log")
    with pytest.raises(SampleError, match="log: .*: expected a file that a search wrote"):
        next(search_front(model, samples[:2], log=log))


def test_the_time_of_a_plan_is_that_of_its_layers(model, samples, monkeypatch):
    """With a clock that counts FLOPs: the sum over layers is what the whole decoder runs."""
    runs = []
    monkeypatch.setattr(layer_times, "_timed", lambda call: runs.append(call) or flops_of(call))
    probe = Probe(Target.of(model), samples[:1])
    seconds = layer_times.LayerTimes(probe, Log())
    batch = probe._batches[0]
    for plan in (VisualPlan.dense(LAYERS), DROPPED, VisualPlan.vica(LAYERS, [0, 2])):
        executor = probe._executor(plan, 0)

        def decoder(executor=executor):
            executor.run(batch.states[0], batch.cos, batch.sin, batch.call)

        assert seconds(plan) == pytest.approx(flops_of(decoder), rel=1e-9)
    measured = len(runs)
    seconds(DROPPED)
    assert len(runs) == measured


def test_a_budget_of_time_is_met(model, samples, monkeypatch):
    monkeypatch.setattr(layer_times, "_timed", flops_of)
    points = list(search_front(model, samples[:2], budget=0.7, cost="time", time_limit=0))
    assert points[0].cost == 1 and points[-1].cost <= 0.7


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
    cached = search_front(model, samples[:2], budget=0.5, cost="kv", objective="accuracy")
    assert min(point.cost for point in cached) <= 0.5
    *_, prefill = search_front(model, samples[:2], budget=0.9, cost="prefill", time_limit=0)
    assert prefill.cost <= 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget: got 0, expected a share"),
        ({"cost": "bytes"}, "cost: got 'bytes', expected one of visual, prefill, kv, time"),
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


def test_the_command_meets_a_budget_of_cached_bytes(tmp_path):
    out = tmp_path / "plan.yaml"
    arguments = ["--data", "tiny-train", "--samples", "4", "--cost", "kv", "--budget", "0.5", "--time-limit", "0s"]
    command = ["search", "--model", str(checkpoint()), *arguments, "--out", str(out), "--json", "-"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
    assert "Loading" not in result.stderr
    plan, shape = VisualPlan.from_yaml(out), load_shape(str(checkpoint()))
    cached, dense = (flops(shape, each).kv_visual_bytes for each in (plan, "dense"))
    assert 0 < cached <= dense / 2
    front = json.loads(result.stdout)["front"]
    assert front[0]["cost"] == 1 and front[-1]["cost"] == cached / dense


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
