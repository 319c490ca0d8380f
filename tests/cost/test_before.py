"""What tokens before the decoder cost: the patched model by torch's counter, and counts spelled out."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vis_sparse
from vis_sparse import LayerPlan, Neighborhood, PlanError, TokensBefore, VisualPlan
from vis_sparse.cost.flops import flops
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.cost.tower import tower_layers
from vis_sparse.executor.before_scores import relevance
from vis_sparse.executor.tower import TowerExecutor, TowerRun
from vis_sparse.executor.tower_tables import TowerTables
from vis_sparse.kernels import get_backend
from vis_sparse.patches.tower import read_tower

from ..models import IMAGE, make_batch, make_model
from ..towers import CASES, DEPTH, HEADS, WIDTH
from .small import LAYOUT, SMALL, TEXT
from .test_tower import grids_of, shape_of

DENSE = VisualPlan.dense(SMALL.layers)


def matmuls(counter) -> int:
    """FLOPs of matrix products that are no attention scores."""
    found = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in found.items() if not any(w in str(operation) for w in ("bmm", "scaled")))


def before(by: str, keep=0.5, plan=DENSE) -> VisualPlan:
    return plan.replace(before=TokensBefore(by, None if by == "duplicate" else keep))


@pytest.mark.parametrize("keep", [0.3, 0.6])
@pytest.mark.parametrize("by", ["received", "relevance", "stride", "change"])
def test_rows_keys_and_cache_are_those_that_come_in(by, keep):
    counts = {
        "change": [6, 2, max(4, int(8 * keep + 1e-6)), 6],
        "stride": {0.3: [2, 1, 2, 2], 0.6: [4, 1, 4, 4]}[keep],  # of 2 x 3, 1 x 2, two frames of 2 x 2, 3 x 2
    }.get(by, [max(1, int(size * keep + 1e-6)) for size in (6, 2, 8, 6)])
    rows = sum(counts)
    report = flops(SMALL, before(by, keep), layout=LAYOUT, text_tokens=TEXT)
    dense = flops(SMALL, "dense", layout=LAYOUT, text_tokens=TEXT)
    assert report.visual_tokens == 22
    assert report.visual_left == (rows,) * SMALL.layers
    first, whole = (each.prefill.layers[0].visual for each in (report, dense))
    assert first.qkv * 22 == whole.qkv * rows
    assert first.ffn * 22 == whole.ffn * rows
    left = [sum(counts[:3]), counts[3]]
    # each row reads those of its sample before it, itself, and the text before: 2 tokens, 2, 3 and 0
    pairs = sum(n * (n + 1) // 2 for n in left) + 2 * counts[0] + 2 * counts[1] + 3 * counts[2]
    assert report.prefill.layers[0].visual.scores == 4 * SMALL.heads * SMALL.head_dim * pairs
    # the last layer's rows are read and not updated; its keys are cached like the others'
    assert report.kv_visual_bytes * 22 == dense.kv_visual_bytes * rows
    paper = dict(layout=LAYOUT, text_tokens=TEXT, convention="paper")
    own, whole = (flops(SMALL, plan, **paper).prefill.layers[0].visual.ffn for plan in (before(by, keep), DENSE))
    assert own * 22 == whole * rows


@pytest.mark.parametrize("by", ["stride", "change", "relevance"])
def test_products_of_the_decoder_are_what_torch_counts(by):
    near = VisualPlan((LayerPlan(attention=Neighborhood(1, "both"), heads=(True, False) * 4, ffn=0.5),) * 3)
    for plan in (VisualPlan.dense(3), near):
        plan, model = before(by, 0.4, plan), make_model("llama", dtype=torch.float32)
        batch = make_batch(model, [(3, IMAGE, 4), (2, IMAGE, 5)])
        report = flops(model, plan, layout=batch.layout, text_tokens=7)
        vis_sparse.patch(model, plan)
        with vis_sparse.use_layout(model, batch.layout):
            call = batch.by_embeds()
            model.model.language_model(**call, use_cache=False)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model.model.language_model(**call, use_cache=False)
        counted = matmuls(counter) - (report.prefill.choosing - chosen_steps(plan, batch) if by == "relevance" else 0)
        assert counted == sum(report.prefill.part(part) for part in ("qkv", "out", "ffn"))


def chosen_steps(plan, batch) -> int:
    """FLOPs of taking tokens one by one, of which torch counts none: products of a matrix and a vector."""
    counts = [(s.size, plan.before.count(s.size)) for s in batch.layout.segments]
    return sum(size * count * (count - 1) for size, count in counts)


def test_relevance_is_a_product_of_all_tokens_and_one_for_each_that_is_taken():
    rows, text = torch.randn(20, 12), torch.randn(5, 12)
    with FlopCounterMode(display=False) as counter:
        relevance(rows, text, 8)
    found = counter.get_total_flops()
    report = flops(SMALL, before("relevance"), layout=LAYOUT, text_tokens=TEXT)
    sizes = [(6, 3), (2, 1), (8, 4), (6, 3)]
    assert report.prefill.choosing == sum(2 * n * n * SMALL.hidden + n * k * (k - 1) for n, k in sizes)
    assert found == 2 * 20 * 20 * 12, "torch's counter knows matrices alone"
    assert report.prefill.whole - report.prefill.lm_head == report.total + report.prefill.choosing


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_attention_received_is_counted_as_torch_does(name):
    """Whole layers have the queries and keys there already; others make all heads' anew."""
    case = CASES[name]
    model = case.model(torch.float32)
    shape, grids = shape_of(case), grids_of(case)
    half = LayerPlan(heads=(True, False) * (HEADS // 2), ffn=0.5)
    for plan in (VisualPlan.dense(DEPTH), VisualPlan((half,) * DEPTH)):
        found = {}
        for scored in (False, True):
            executor = TowerExecutor(read_tower(case.kind, model), plan, get_backend("torch"))
            executor.kept_cuts.refresh()
            rows = case.kind.rows(model, case.call())
            hidden = torch.randn(len(rows.y), WIDTH)
            angles = torch.rand(len(rows.y), WIDTH // HEADS // 2).repeat(1, 2)
            run = TowerRun(executor, TowerTables.of(rows, torch.device("cpu")), DEPTH, scored)
            with FlopCounterMode(display=False) as counter:
                for index in range(DEPTH):
                    hidden = run.layer(index, hidden, (angles.cos(), angles.sin()) if case.is_packed else None)
            found[scored] = counter.get_total_flops()
        costs = [tower_layers(shape, plan, grids, scored=scored) for scored in (False, True)]
        assert found[True] - found[False] == sum(c.total for c in costs[1]) - sum(c.total for c in costs[0]) > 0


def test_duplicates_cost_neither_the_tower_nor_the_decoder():
    shape = load_shape("qwen2-vl-7b")
    settings = dict(image_size=(1120, 1932))
    plan = VisualPlan.dense(shape.layers).replace(before=TokensBefore("duplicate"))
    whole, none, half = (
        flops(shape, each, **settings, duplicates=share) for each, share in (("dense", 0), (plan, 0), (plan, 0.5))
    )
    patches = 80 * 138
    embedding = 2 * patches * 1176 * 1280
    assert none.prefill.vision_tower == whole.prefill.vision_tower
    assert half.visual_left[0] * 2 == whole.visual_tokens
    for part in ("qkv", "ffn", "out"):
        before_, after = (sum(getattr(c.visual, part) for c in r.prefill.tower_layers) for r in (whole, half))
        assert after * 2 == before_
    assert half.prefill.tower_layers[0].visual.scores * 4 == whole.prefill.tower_layers[0].visual.scores
    assert half.prefill.vision_tower - sum(layer.total for layer in half.prefill.tower_layers) == embedding
    assert half.prefill.projector == whole.prefill.projector, "behind the tower all rows are there again"
    with pytest.raises(PlanError, match=re.escape("duplicates: got 1, expected a share in [0, 1)")):
        flops(shape, plan, duplicates=1)
