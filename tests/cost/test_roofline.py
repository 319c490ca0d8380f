"""Roofline bounds: worked by hand for one layer, and what they show about batches."""

import json

import pytest
from typer.testing import CliRunner

from vis_sparse.cli.main import app
from vis_sparse.cost.flops import flops
from vis_sparse.cost.roofline import DEVICES, DeviceSpec, device_spec, roofline
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.cost.shapes import ModelShape
from vis_sparse.plans.budgets import resolve_heads
from vis_sparse.plans.files import as_plan
from vis_sparse.plans.layer_plan import PlanError
from vis_sparse.plans.plan import VisualPlan

TINY = ModelShape("tiny", layers=1, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=10)
# one FLOP a second and one byte a second, so that a bound is the larger of two counts
UNIT = DeviceSpec("unit", 1.0, 1.0)


def bounds(name: str, batch: int):
    shape = load_shape("llava-1.5-7b")
    plan = resolve_heads(as_plan(name, shape.layers), shape.heads, shape.kv_heads, "first")
    return roofline(shape, plan, flops(shape, plan, batch=batch), device_spec("h100"))


def test_by_hand():
    from vis_sparse.layout.layout import VisualLayout

    layout = VisualLayout.from_grids([[(1, (1, 1, 2))]])
    plan = VisualPlan.dense(1)
    cost = flops(TINY, plan, layout=layout, text_tokens=3)
    found = roofline(TINY, plan, cost, UNIT)
    rows = 5
    moved = {
        "qkv": 8 * 16 + rows * (8 + 16),
        "scores": 2 * 4 * (rows * 2 + rows * 1),
        "out": 8 * 8 + rows * (8 + 8),
        "ffn": 3 * 8 * 16 + 2 * 8 * rows,
        "lm_head": 8 * 10 + 8 + 10,
    }
    counted = {"qkv": 2 * rows * 8 * 16, "scores": 2 * 2 * 4 * 2 * 15, "out": 2 * rows * 64, "ffn": 2 * rows * 384}
    counted["lm_head"] = 2 * 80
    for part, bound in found.prefill.parts.items():
        assert (bound.flops, bound.bytes) == (counted[part], 2 * moved[part])
        assert bound.seconds == max(counted[part], 2 * moved[part])
    # the step reads the keys of all tokens, its own included, and every weight for one row
    assert found.decode.parts["scores"].bytes == 2 * 2 * 4 * (2 + 6)
    assert found.decode.parts["ffn"].bytes == 2 * (384 + 16)


def test_speedup_bound_lies_below_the_flop_ratio_and_grows_with_the_batch():
    ratios = [bounds("dense", b).prefill.seconds / bounds("yopo-12", b).prefill.seconds for b in (1, 4, 16)]
    fewer = flops("llava-1.5-7b", "dense").total / flops("llava-1.5-7b", "yopo-12").total
    assert 1 < ratios[0] < ratios[1] < ratios[2] < fewer
    assert ratios[0] < 0.5 * fewer


@pytest.mark.parametrize("name", DEVICES)
def test_command_says_bound(name):
    result = CliRunner().invoke(app, ["flops", "--plan", "yopo-12,auto", "--device", name])
    assert result.exit_code == 0
    assert "bound" in result.output and "time" not in result.output.replace("not times", "")
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_command_as_json():
    result = CliRunner().invoke(app, ["flops", "--plan", "yopo-12", "--device", "h100", "--json", "-"])
    found = json.loads(result.stdout)["bounds"]
    assert [bound["plan"] for bound in found] == ["dense", "yopo-12"]
    assert all(b["prefill"]["bound_s"] == sum(p["bound_s"] for p in b["prefill"]["parts"].values()) for b in found)


def test_unknown_device_and_convention():
    with pytest.raises(PlanError, match="got 'b200', expected one of a100, h100, h200, mi300x"):
        device_spec("b200")
    shape = load_shape("llava-1.5-7b")
    plan = VisualPlan.dense(shape.layers)
    with pytest.raises(PlanError, match="got convention 'paper', expected executed"):
        roofline(shape, plan, flops(shape, plan, convention="paper"), device_spec("h100"))
