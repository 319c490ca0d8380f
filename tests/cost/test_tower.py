"""Towers under plans: counts against what torch counts of the patched encoder, and against pairs spelled out."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vis_sparse.cost.flops import flops
from vis_sparse.cost.shapes import VisionShape
from vis_sparse.cost.tower import tower_layers
from vis_sparse.executor.tower import TowerExecutor, TowerRun
from vis_sparse.executor.tower_tables import TowerTables
from vis_sparse.kernels import get_backend
from vis_sparse.patches.tower import blocks_of, read_tower
from vis_sparse.plans.files import load_plan
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood, PlanError, TokenBudget
from vis_sparse.plans.plan import VisualPlan

from ..marks import slow_but
from ..tower_oracle import Places, read_by
from ..towers import CASES, DEPTH, GRIDS, HEADS, NEURONS, WIDTH, random_plan

TOKENS = (
    LayerPlan(tokens=TokenBudget(0.5, "stride")),
    LayerPlan(),
    LayerPlan(ffn=0.5, tokens=TokenBudget(0.3, "norm")),
)


def shape_of(case) -> VisionShape:
    return VisionShape(
        DEPTH,
        WIDTH,
        HEADS,
        NEURONS,
        96,
        case.has_class_token,
        gated="gate" in case.kind.places,
        whole_norms=case.name == "InternViT with norms",
        window=4 if case.name == "Qwen2.5-VL" else 0,
        full=(1,),
    )


def grids_of(case):
    return [(h, w) for frames, h, w in GRIDS for _ in range(frames)] if case.is_packed else [(3, 5)] * 2


def counted(case, model, plan) -> int:
    """FLOPs of the matrix products of an encoder's layers under a plan, scores left out."""
    executor = TowerExecutor(read_tower(case.kind, model), plan, get_backend("torch"))
    rows = case.kind.rows(model, case.call())
    executor.kept_cuts.refresh()
    hidden = torch.randn(len(rows.y), WIDTH)
    angles = torch.rand(len(rows.y), WIDTH // HEADS // 2).repeat(1, 2)
    call = TowerRun(executor, TowerTables.of(rows, torch.device("cpu")), DEPTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for index in range(DEPTH):
            hidden = call.layer(index, hidden, (angles.cos(), angles.sin()) if case.is_packed else None)
    found = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in found.items() if not any(w in str(operation) for w in ("bmm", "scaled")))


@pytest.mark.parametrize("seed", slow_but([0], range(3)))
@pytest.mark.parametrize("name", CASES)
def test_projections_and_ffn_are_what_torch_counts(name, seed):
    case = CASES[name]
    plan = random_plan(40 + seed)
    costs = tower_layers(shape_of(case), plan, grids_of(case))
    own = sum(lane.qkv + lane.out + lane.ffn for cost in costs for lane in (cost.visual, cost.text))
    assert own == counted(case, case.model(torch.float32), plan)


@pytest.mark.parametrize("name", ["CLIP", "Qwen2.5-VL"])
@pytest.mark.parametrize("attention", ["full", "none", Neighborhood(1, "both"), Neighborhood(0, "both", stride=3)])
def test_scores_are_the_pairs_that_are_read(name, attention):
    case = CASES[name]
    layer = LayerPlan(attention=attention, heads=(True, False, True, True))
    costs = tower_layers(shape_of(case), VisualPlan((layer,) * DEPTH), grids_of(case))
    whole, windows, windowed = case.places(case.model())
    for index, cost in enumerate(costs):
        places = windows if windowed and windowed[index] else whole
        allowed = read_by(layer, places, torch.tensor(layer.heads), torch.ones(len(places.y), dtype=torch.bool))
        asked = places.is_patch if attention != "none" else torch.zeros_like(places.is_patch)
        pairs = int(allowed[:, asked | ~places.is_patch].sum())
        assert cost.visual.scores + cost.text.scores == 4 * (WIDTH // HEADS) * pairs


def test_patches_that_left_cost_nothing():
    grids = [(4, 6), (2, 3)]
    shape = VisionShape(3, WIDTH, HEADS, NEURONS, 96, False)
    costs = tower_layers(shape, VisualPlan(TOKENS), grids)
    assert costs[0] == tower_layers(shape, None, grids)[0]
    left = 4 * 3 + 2 * 3 // 2  # every other column of the first, and of the second
    assert costs[1].visual.qkv == 6 * left * WIDTH**2
    assert costs[1].visual.scores == 4 * WIDTH * (12**2 + 3**2)
    assert costs[2].visual.ffn == 4 * left * WIDTH * NEURONS // 2


def test_places_agree_with_the_oracles():
    """That the test above would see a window that is cut otherwise."""
    y, x = (torch.from_numpy(axis.ravel()) for axis in np.indices((5, 3)))
    places = Places(torch.zeros(15, dtype=torch.long), y, x)
    layer = LayerPlan(attention=Neighborhood(1, "both"))
    read = read_by(layer, places, torch.ones(1, dtype=torch.bool), torch.ones(15, dtype=torch.bool))
    shape = VisionShape(1, 8, 1, 8, 3, False)
    assert tower_layers(shape, VisualPlan((layer,)), [(5, 3)])[0].visual.scores == 4 * 8 * int(read.sum())


def test_a_section_is_counted_end_to_end():
    plain, plan = (VisualPlan.dense(32) for _ in range(2))
    near = LayerPlan(attention=Neighborhood(2, "both"), ffn=0.5)
    dense = flops("llava-1.5-7b", plain).prefill
    assert dense.vision_tower == flops("llava-1.5-7b", "yopo-12").prefill.vision_tower
    cut = flops("llava-1.5-7b", plan.replace(tower=load_plan("dense").resolve(24))).prefill
    layer = dense.tower_layers[0].total
    assert dense.vision_tower - cut.vision_tower == layer, "the layer behind the feature layer"
    assert cut.tower_layers[-1].total == 0 and cut.total == dense.total and cut.is_whole
    less = flops("llava-1.5-7b", plan.replace(tower=VisualPlan((near,) * 24))).prefill
    assert less.whole == less.total + less.vision_tower + less.projector + less.lm_head < cut.whole
    with pytest.raises(PlanError, match="plan 'dense': plan 'tower': got 2 layers, expected the model's 24"):
        flops("llava-1.5-7b", plan.replace(tower=VisualPlan((near,) * 2)))


def test_shapes_know_what_the_kinds_do():
    """That the shape above is the encoder's: its windows and matrices, and layers of the same number."""
    for case in CASES.values():
        tower = read_tower(case.kind, case.model())
        shape = shape_of(case)
        assert [layer.windowed for layer in tower.layers] == [shape.is_windowed(index) for index in range(DEPTH)]
        assert len(blocks_of(case.kind, case.model())) == shape.layers
