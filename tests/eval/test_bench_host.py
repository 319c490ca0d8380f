"""Host time and launches of calls: what is counted is what is dispatched. No test looks at a time."""

import json

import pytest
import torch
from typer.testing import CliRunner

import vis_sparse
from vis_sparse.cli.main import app as cli
from vis_sparse.eval.bench_host import PARTS, PHASES, UNPATCHED, bench_host, launches
from vis_sparse.eval.launches import Launches

from ..marks import slow_but


@pytest.fixture(scope="module")
def rows():
    threads, told = torch.get_num_threads(), []
    settings = {"layers": 4, "batch": 2, "repeats": 2, "scattered": True}
    found = bench_host("qwen2-vl-2b", ["auto", "yopo-12"], on_turn=lambda *turn: told.append(turn), **settings)
    assert told == [(done, 8) for done in range(1, 9)] and torch.get_num_threads() == threads
    return found


def test_every_variant_has_every_figure(rows):
    assert [row["plan"] for row in rows] == ["unpatched", "dense", "auto", "yopo-12"]
    for row in rows:
        assert (row["layers"], row["heads"], row["kv_heads"], row["batch"]) == (4, 12, 2, 2)
        for phase in PHASES:
            own = row[phase]
            assert own["spread"][0] <= own["s"] <= own["spread"][1] and own["ratio"] > 0
            assert set(own["parts"]) == set(PARTS) and min(own["parts"].values()) > 0
            assert sum(own["launches_by_kind"].values()) == own["launches"]
            assert own["launches_ratio"] == own["launches"] / rows[0][phase]["launches"]
    json.dumps(rows)


def test_an_unpatched_layer_has_seven_products_and_one_attention(rows):
    """In a decode step; the LM head is one more, the tower does not run."""
    kinds = rows[0]["decode"]["launches_by_kind"]
    assert (kinds["products"], kinds["attention"]) == (4 * 7 + 1, 4)


def test_views_are_no_launches():
    with Launches() as counted:
        x = torch.zeros(4, 4)
        x.t()[:2].add_(1)
        torch.mm(x, x.view(4, 4))
    assert counted.ops == {"aten.zeros.default": 1, "aten.add_.Tensor": 1, "aten.mm.default": 1}
    assert counted.totals() == (3, 3 + sum(counted.views.values())) and counted.views
    assert counted.by_kind() == {"products": 1, "attention": 0, "copies": 0, "others": 2}


SETTINGS = {
    "llava": ("llava-1.5-7b", False),
    "llava-scattered": ("llava-1.5-7b", True),
    "qwen-first": ("qwen2-vl-7b", False),
    "qwen-scattered": ("qwen2-vl-7b", True),
}


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("setting", slow_but(["llava", "qwen-scattered"], SETTINGS))
def test_no_shipped_plan_launches_more_than_the_unpatched_model(setting, batch, record_property):
    """At full depth, in prefill and in decode; views are none."""
    model, scattered = SETTINGS[setting]
    found = launches(model, sorted(set(vis_sparse.plan_names()) - {"dense"}), batch=batch, scattered=scattered)
    record_property("launches", found)
    base = found.pop(UNPATCHED)
    assert found.keys() == set(vis_sparse.plan_names())
    more = {(plan, phase): own[phase] for plan, own in found.items() for phase in PHASES if own[phase] > base[phase]}
    assert not more, (more, base)


def test_command(tmp_path):
    file = tmp_path / "host.json"
    options = ["--model", "llava-1.5-7b", "--layers", "2", "--plan", "auto", "--repeats", "1", "--json", str(file)]
    done = CliRunner().invoke(cli, ["bench", "--host", *options], catch_exceptions=False)
    assert done.exit_code == 0 and "Decode step" in done.output and "dense" in done.output
    assert [row["plan"] for row in json.loads(file.read_text())] == ["unpatched", "dense", "auto"]
    refused = CliRunner().invoke(cli, ["bench", "--scattered"])
    assert refused.exit_code == 2 and "--host" in refused.output
