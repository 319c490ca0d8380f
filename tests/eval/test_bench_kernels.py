"""`vis-sparse bench kernels`: what it counts and reports; its times are only looked at for being there."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vis_sparse.cli.main import app
from vis_sparse.eval.bench_kernels import SETTINGS, Case

from ..kernels.cases import CPU


def test_figures():
    command = ["bench", "kernels", "--settings", "24x24", "--radius", "2,3", "--most-heads", "2", "--repeats", "1"]
    result = CliRunner().invoke(app, [*command, "--ways", "dense,torch", "--json", "-"])
    assert result.exit_code == 0, result.output
    dense, ours, dense_again, _ = json.loads(result.stdout)
    assert dense_again == dense | {"radius": 3}
    assert (dense["way"], ours["way"]) == ("dense", "torch")
    assert ours["error"] <= 1e-5 and dense["share_of_ideal"] is None
    # windows of 5 x 5 cut off at the border, and 35 tokens of text
    pairs = (5 * 24 - 6) ** 2 + 35 * 576
    assert ours["useful_flops_per_second"] * ours["seconds"] == pytest.approx(4 * pairs * 2 * 128)
    assert ours["share_of_ideal"] == pytest.approx(ours["speedup"] * pairs / (611 * 612 / 2))


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {"128x128"}))
def test_settings_fit_their_models(name):
    case = Case(name, 1, [2], "both", CPU, torch.float32, 1)
    assert case.heads // case.kv_heads == SETTINGS[name].heads // SETTINGS[name].kv_heads
    assert len(case.query) == sum(f * h * w for f, h, w in SETTINGS[name].grids)
    assert case.pairs[2] < case.dense_pairs


def test_unknown_setting_is_refused():
    result = CliRunner().invoke(app, ["bench", "kernels", "--settings", "25x25"])
    assert result.exit_code == 2 and "25x25" in result.output
