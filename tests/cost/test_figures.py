"""Figures in print, and the formulas that they come from."""

import pytest

from vis_sparse.cost.flops import flops
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood, TokenBudget
from vis_sparse.plans.plan import VisualPlan

from .small import LAYOUT, SMALL, TEXT, brute_pairs

TERA = 1e12


def tera(shape, plan, convention):
    return flops(shape, plan, convention=convention).total / TERA


@pytest.mark.parametrize(
    ("shape", "plan", "convention", "low", "high"),
    [
        # arXiv 2410.06169, tables 1 and 2; the plans must not cost more than the paper's
        ("llava-1.5-7b", "dense", "paper", 7.625, 7.635),
        ("llava-1.5-13b", "dense", "paper", 14.885, 14.895),
        ("llava-1.5-7b", "yopo-25", "paper", 1.80, 1.91),
        ("llava-1.5-13b", "yopo-25", "paper", 3.50, 3.72),
        ("llava-1.5-7b", "yopo-12", "paper", 0.88, 0.93),
        ("llava-1.5-13b", "yopo-12", "paper", 1.70, 1.80),
        # the other conventions for the same model
        ("llava-1.5-7b", "dense", "macs", 3.815, 3.825),
        ("llava-1.5-7b", "dense", "fastv", 2.98, 2.99),
        # with 64 text tokens, 640 in all: 8.4
        ("llava-1.5-7b", "dense", "executed", 8.35, 8.45),
        # FastV's own formula: 2 layers with 576 tokens, 30 with 288
        ("llava-1.5-7b", "fastv", "fastv", 1.56, 1.57),
        # 8 layers each with 576, 288, 144 and 72 tokens
        ("llava-1.5-7b", "pyramiddrop", "paper", 3.55, 3.56),
        # ViCA's own figure is 4 % of the visual compute
        ("llava-1.5-7b", "vica", "paper", 0.30, 0.32),
    ],
)
def test_figures_in_print(shape, plan, convention, low, high):
    assert low <= tera(shape, plan, convention) <= high


def test_the_papers_formula_to_the_last_flop():
    n, d, m = 576, 4096, 11008
    assert flops("llava-1.5-7b", "dense", convention="paper").total == 32 * 2 * (
        4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m
    )
    assert flops("llava-1.5-7b", "dense", convention="fastv").total == 32 * (
        4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    )
    for plan in ("dense", "yopo-25", "vica", "hollow"):
        assert 2 * tera("llava-1.5-7b", plan, "macs") == tera("llava-1.5-7b", plan, "paper")


def test_the_papers_formula_scaled_by_a_plan():
    n, d, m = 576, 4096, 11008
    pairs = brute_pairs(Neighborhood(2, "both"), 1, 24, 24)
    layers = [layer.total for layer in flops("llava-1.5-7b", "yopo-12", convention="paper").prefill.layers]
    assert layers[0] == layers[1] == 2 * (4 * n * d**2 + 2 * pairs * d + 3 * n * d * m // 4)
    assert set(layers[2:16]) == {2 * (4 * n * d * d // 8 + 2 * pairs * d // 8 + 3 * n * d * m // 4)}
    assert set(layers[16:]) == {0}


def test_frozen_rows_pay_for_keys_and_values_only():
    n, d = 576, 4096
    layers = [layer.total for layer in flops("llava-1.5-7b", "vica", convention="paper").prefill.layers]
    assert [i for i, cost in enumerate(layers) if cost] == [0, 1, 7, 8, 9, 10, 11, 14]
    assert {cost for cost in layers if cost} == {2 * 2 * n * d**2}


def test_nominal_counts_do_not_know_the_semantics():
    plan = VisualPlan.yopo(4, layer_cut=2, ffn_ratio=2)
    zero = plan.replace(semantics="zero")
    costs = [flops(SMALL, each, layout=LAYOUT, text_tokens=TEXT, convention="paper") for each in (plan, zero)]
    assert costs[0].total == costs[1].total
    assert [layer.total > 0 for layer in costs[1].prefill.layers] == [True, True, False, False]
    assert costs[0].decode is None


def test_a_layer_without_active_heads_reads_nothing():
    layers = (LayerPlan(), LayerPlan(), LayerPlan(heads=(False,) * 6), LayerPlan(heads=(False,) * 6))
    cost = flops(SMALL, VisualPlan(layers), layout=LAYOUT, text_tokens=TEXT, convention="paper").prefill
    assert [layer.total > 0 for layer in cost.layers] == [True, True, False, False]


def test_tokens_that_left_by_the_formula():
    n, d, m, last = 576, 4096, 11008, 31
    layers = flops("llava-1.5-7b", "fastv", convention="fastv").prefill.layers
    counts = [n] * 2 + [n // 2] * 30
    assert [layer.total for layer in layers] == [4 * c * d**2 + 2 * c**2 * d + 2 * c * d * m for c in counts]

    report = flops("llava-1.5-7b", "pyramiddrop")
    assert report.visual_left == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    assert report.kv_visual_bytes == 8 * (576 + 288 + 144 + 72) * 2 * 4096 * 2
    left, visual = report.visual_left, [layer.visual for layer in report.prefill.layers]
    assert [lane.ffn for lane in visual] == [2 * 3 * c * d * m for c in left[:last]] + [0]
    assert [lane.scores for lane in visual[:last]] == [4 * d * (c * (c + 1) // 2 + 35 * c) for c in left[:last]]
    # the last text row once more over all keys, without values, in the layers that choose
    chosen = [2 * d * (64 + c) if i in (7, 15, 23) else 0 for i, c in enumerate(left)]
    text = [4 * d * (64 * 65 // 2 + 29 * c) for c in left]
    assert [layer.text.scores for layer in report.prefill.layers] == [a + b for a, b in zip(text, chosen)]
    assert flops("llava-1.5-7b", "random-drop").total == flops("llava-1.5-7b", "fastv").total - 2 * d * (64 + 576)


def test_nobody_leaves_where_nobody_comes_after():
    layers = (LayerPlan(), LayerPlan(tokens=TokenBudget(0.5)), LayerPlan.off(), LayerPlan.off())
    assert flops(SMALL, VisualPlan(layers), layout=LAYOUT, text_tokens=TEXT).visual_left == (LAYOUT.num_visual,) * 4
