"""Comparison: the paired statistic on made-up answers, the rivals' budgets, and the tables."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vis_sparse import patched
from vis_sparse.calibration.profiles import Target
from vis_sparse.calibration.vision import Vision
from vis_sparse.eval.comparison import tables
from vis_sparse.eval.comparison.answers import Answers, answers, computed
from vis_sparse.eval.comparison.paired import holm, mcnemar, only_one_right
from vis_sparse.eval.comparison.plans import NEURONS, Field, add_budget, add_heads, add_neurons
from vis_sparse.eval.comparison.rows import paired
from vis_sparse.eval.comparison.setup import Setup
from vis_sparse.eval.comparison.whole import named
from vis_sparse.eval.tiny import NAMES, checkpoint
from vis_sparse.eval.tiny.data import KINDS, questions
from vis_sparse.eval.tiny.score import answers as generated
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.scores import Calibration

LAYERS, HEADS, SIZE = 4, 8, 100


def answered(*right):
    return np.array(right, dtype=bool)


def test_questions_that_one_plan_alone_answers_right():
    ours, theirs = answered(1, 1, 1, 0, 0, 1), answered(1, 0, 0, 1, 0, 0)
    assert only_one_right(ours, theirs) == (3, 1)
    assert only_one_right(ours, ours) == (0, 0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 0), (2, 2), (1, 6), (9, 3)])
def test_p_is_the_share_of_all_coin_throws_as_uneven(first, second):
    throws = [sum(throw) for throw in itertools.product((0, 1), repeat=first + second)]
    uneven = abs(first - second)
    share = np.mean([abs(2 * heads - first - second) >= uneven for heads in throws])
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(share)


def test_p_of_many_questions():
    """Against the normal approximation with continuity correction."""
    assert mcnemar(1060, 940) == pytest.approx(0.0078, rel=0.02)
    assert 0 < mcnemar(4000, 0) < 1e-300 or mcnemar(4000, 0) == 0


def test_even_plans_are_rarely_called_uneven():
    """Two plans with the same chance of a right answer on each of 200 questions: at most 5 % of 2,000 pairs."""
    rng = np.random.default_rng(0)
    pairs = rng.random((2000, 2, 200)) < 0.9
    assert np.mean([mcnemar(*only_one_right(*pair)) < 0.05 for pair in pairs]) <= 0.05


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0]) and holm([]) == [] and holm([0.2]) == [0.2]


def made_up(seed=1):
    rng = np.random.default_rng(seed)
    names = ("mass", "effects", "text_mass", "attention_change", "ffn_change")
    return Calibration(
        heads=rng.random((LAYERS, HEADS)), neurons=rng.random((LAYERS, SIZE)),
        ratios=np.ones((1, LAYERS, HEADS)), **{name: rng.random((LAYERS, HEADS)) for name in names},
    )  # fmt: skip


def test_rival_masks_keep_as_many_heads_in_every_layer():
    field, calibration = Field(), made_up()
    add_heads(field, calibration)
    counts = {name: [sum(layer.heads) for layer in plan.layers] for name, plan in field.plans.items()}
    best = np.sort(calibration.heads, axis=None)[-LAYERS * HEADS // 4]
    assert counts["heads: calibrated"] == (calibration.heads >= best).sum(1).tolist()
    assert sum(counts["heads: inverted"]) == LAYERS * HEADS // 4
    like = [name for name in field.plans if name != "heads: inverted"]
    assert len(like) == 8 and all(counts[name] == counts["heads: calibrated"] for name in like)
    assert len({field.plans[name].layers for name in like}) == 8
    assert set(field.rivals["heads: calibrated"]) == set(field.plans) - {"heads: calibrated"}


def test_rival_neurons_are_as_many():
    field, calibration = Field(), made_up()
    add_neurons(field, calibration)
    for share in NEURONS:
        (best, *_), (first, *_) = (
            field.plans[f"neurons {share:.0%}: {name}"].layers for name in ("calibrated", "first")
        )
        kept = round(share * SIZE)
        assert best.ffn == tuple(sorted(np.argsort(-calibration.neurons[0])[:kept].tolist()))
        assert first.ffn == share and first.neurons(SIZE) == kept
    assert field.plans["neurons 0%"].layers == (LayerPlan(ffn=0.0),) * LAYERS


def test_rivals_of_a_budget_are_the_best_within_it_or_the_cheapest():
    chain = [VisualPlan((LayerPlan(ffn=share),)) for share in (1.0, 0.25, 0.125, 0.75, 0.5)]

    def share(plan):
        return plan.layers[0].ffn

    def odd(plan):
        """A loss that is not least for the dearest plan."""
        return abs(share(plan) - 0.2)

    found, field = VisualPlan((LayerPlan(ffn=0.3),)), Field()
    add_budget(field, 0.5, found, {"A": chain, "B": [chain[0], chain[3]], "C": chain[2:3]}, share, odd)
    assert {name: share(plan) for name, plan in field.plans.items()} == {
        "50%: searched": 0.3, "50%: A": 0.25, "50%: B": 0.75, "50%: C": 0.125,
    }  # fmt: skip
    assert field.rivals == {"50%: searched": ["50%: A", "50%: B", "50%: C"]}


def test_pairs_and_their_table():
    field = Field()
    ours, theirs = (VisualPlan((LayerPlan(ffn=share),)) for share in (0.3, 0.5))
    field.add("30%", ("searched", ours), {"A": theirs})
    right = {name: {kind: np.ones(20, dtype=bool) for kind in KINDS} for name in ("ours", "theirs")}
    right["theirs"]["place"][:9] = False
    right["ours"]["count"][:6] = False
    right["theirs"]["count"][19] = False
    given = {computed(ours): Answers(right["ours"], 0.1), computed(theirs): Answers(right["theirs"], 0.2)}
    rows = paired(field, given)
    by_kind = {row["kind"]: (row["only_plan"], row["only_rival"]) for row in rows}
    kinds = {"easy_vqa": (0, 0), "place": (9, 0), "count": (1, 6), "exists": (0, 0)}
    assert by_kind == kinds | {"digit grid": (10, 6)}
    assert [row["p_holm"] for row in rows] == pytest.approx([1, 5 * 2 / 2**9, 4 * 16 / 2**7, 1, 1])
    *_, line = tables.pairs(rows).splitlines()
    assert line == "| 30%: searched | 30%: A | 0 : 0 | 9 : 0, p 0.0039 << | 1 : 6, p 0.12 | 0 : 0 | 10 : 6, p 0.45 |"


def test_answers_are_those_of_greedy_generate(monkeypatch):
    """In several pieces, under the dense plan and one that answers some questions wrong."""
    monkeypatch.setattr("vis_sparse.eval.comparison.answers._CHUNK", 4)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    processor, layers = AutoProcessor.from_pretrained(checkpoint()), model.config.text_config.num_hidden_layers
    tower = VisualPlan((LayerPlan(attention=Neighborhood(1, "both")),) * 4)
    plans = (VisualPlan.dense(layers), VisualPlan.vtw(layers, 1), VisualPlan.dense(layers).replace(tower=tower))
    steps, target = [], Target.of(model)
    asked = answers(target, processor, [*plans, plans[0]], 6, lambda *step: steps.append(step), Vision.of(target))
    given = {plan: asked[computed(plan)] for plan in plans}
    assert len(asked) == 3 and steps == [(step, 24) for step in range(1, 25)]
    for plan in plans:
        for kind in KINDS:
            asked = questions(kind, 6)
            with patched(model, plan):
                said = generated(model, processor, asked)
            expected = [text == question.answer for text, question in zip(said, asked, strict=True)]
            assert given[plan].right[kind].tolist() == expected
    assert given[plans[0]].kl == pytest.approx(0, abs=1e-6) and given[plans[1]].kl > 0.1
    assert not given[plans[1]].right["place"].all()


def test_plans_by_name_are_asked_with_their_towers(tmp_path):
    steps = []
    settings = {"asked": 2, "time_limit": None, "out": tmp_path, "on_step": lambda *step: steps.append(step)}
    setup = Setup.of("llava", 2, True, **settings)
    result = named(setup, ["whole-25", "auto"])["budgets"]
    dense, whole, auto = result["plans"]
    assert [row["plan"] for row in result["plans"]] == ["dense", "whole-25", "auto"]
    assert dense["cost"] == 1 > auto["cost"] > whole["cost"] > 0.3 and dense["kl"] < 1e-6 < whole["kl"]
    assert "tower" not in auto and "stride=16" in whole["tower"][-1] and "stride" not in whole["tower"][0]
    assert {(row["plan"], row["rival"]) for row in result["pairs"]} == {("whole-25", "dense"), ("auto", "dense")}
    assert steps[-1] == (12, 12)


@pytest.mark.parametrize(
    "family, number", [("llava", 8), *(pytest.param(name, 30, marks=pytest.mark.slow) for name in NAMES)]
)
def test_calibrated_heads_and_neurons_are_better_than_others(family, number):
    """By the shipped scores, on held-out questions. A quarter of the heads: KL below that of every random mask, and at
    least 10 points more than the worst quarter on place and count. Neurons: KL below that of as many first ones."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    field, calibration = Field(), Calibration.load(checkpoint(family) / "heads.safetensors")
    add_heads(field, calibration)
    add_neurons(field, calibration)
    given = answers(Target.of(model), processor, field.plans.values(), number, lambda done, total: None)
    ours = given[computed(field.plans["heads: calibrated"])]
    for rival in field.rivals["heads: calibrated"]:
        assert ours.kl < given[computed(field.plans[rival])].kl / 1.5, rival
    worst = given[computed(field.plans["heads: inverted"])]
    assert all(ours.score(kind) >= worst.score(kind) + 0.1 for kind in ("place", "count"))
    for share in NEURONS:
        best, first = (given[computed(field.plans[f"neurons {share:.0%}: {name}"])] for name in ("calibrated", "first"))
        assert best.kl < first.kl
