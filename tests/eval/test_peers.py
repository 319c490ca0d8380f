"""`vis-sparse bench --peers`: what is installed generates, and what is not says why. No time is looked at."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

import vis_sparse
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.eval import peers as module
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood
from vis_sparse.plans.plan import VisualPlan


@pytest.fixture(autouse=True)
def small_image(monkeypatch):
    monkeypatch.setattr(module, "GRID", (4, 6))
    monkeypatch.setattr(module, "NEW_TOKENS", 2)


@pytest.fixture
def shape():
    small = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96}
    return dataclasses.replace(load_shape("qwen2-vl-7b"), **small)


def absent(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.slow
def test_rows_that_run_and_rows_that_say_why(shape, monkeypatch):
    absent(monkeypatch, "sparsevlm", "natten")
    plan = VisualPlan((LayerPlan(attention=Neighborhood(1), ffn=0.5),) * 2)
    rows = {row["peer"]: row for row in module.peers(shape, {"mine": plan}, text_tokens=3, repeats=1)}
    for name in ("unpatched", "unpatched, eager attention", "vis_sparse, mine", "vis_sparse, mine, FlexAttention"):
        assert "why" not in rows[name], rows[name]
        assert rows[name]["s"] > 0
    assert rows["vis_sparse, mine"]["peak_bytes"] > 0
    for name in ("sparsevlm, 25% of the tokens", "natten"):
        assert "ModuleNotFoundError" in rows[name]["why"] and "s" not in rows[name]


def test_a_peer_gets_what_it_asks_for_and_leaves_the_model_alone(shape, monkeypatch):
    seen = {}

    def generate(model, processor, inputs, **settings):
        seen.update(settings, attentions=model(**inputs, output_attentions=True).attentions)
        raise ValueError("no\nluck")

    stand_in = ModuleType("sparsevlm")
    stand_in.sparsevlm_generate = generate
    monkeypatch.setitem(sys.modules, "sparsevlm", stand_in)
    absent(monkeypatch, "natten")
    model = module.qwen2_5_vl(shape, torch.float32, torch.device("cpu"))
    inputs = module.prompt(model, 3)
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model(**inputs).logits
        calls = module.ways(model, inputs, {})
        context, call = calls["sparsevlm, 25% of the tokens"]
        with pytest.raises(ValueError), context():
            call()
        assert (seen["n_vis"], seen["keep_n_vis"]) == (24, 6)
        assert all(matrix.shape[-1] == 27 for matrix in seen["attentions"])
        assert model.config._attn_implementation == before
        assert vis_sparse.inspect(model) is None
        assert torch.equal(model(**inputs).logits, expected)
    rows = {row["peer"]: row for row in module.peers(shape, {}, text_tokens=3, repeats=1)}
    assert rows["sparsevlm, 25% of the tokens"]["why"] == "ValueError: no luck"
