"""`inspect`: what a patched model says of itself."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vis_sparse
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood
from vis_sparse.plans.plan import VisualPlan

from ..models import HEADS, IMAGE, LAYERS, NEURONS, make_batch, make_model

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.mkldnn._linear_pointwise)
SCATTERED = LayerPlan(True, Neighborhood(1), (False, True) * (HEADS // 2), 0.5)


@torch.no_grad()
def test_counts_the_last_prompt():
    """The executed FLOPs, to the last product (scores apart: torch's CPU kernel does not register them)."""
    model = vis_sparse.patch(make_model(dtype=torch.float32), VisualPlan((SCATTERED,) * LAYERS))
    batch = make_batch(model, [(5, IMAGE, 4), (5, IMAGE, 4)])
    embeds = batch.embeds.float()
    with vis_sparse.use_layout(model, batch.layout), FlopCounterMode(display=False) as counter:
        model.model.language_model(inputs_embeds=embeds)
    seen = vis_sparse.inspect(model)
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(op, 0) for op in _PRODUCTS)
    report = vis_sparse.flops(model, seen["plan"], layout=batch.layout, text_tokens=9)
    assert seen["flops"] == report.total < seen["flops_dense"]
    assert seen["flops"] - report.prefill.part("scores") == products


@torch.no_grad()
def test_counts_the_prompt_of_a_generation():
    """Decode steps follow it, and leave its counts."""
    model = vis_sparse.patch(make_model(dtype=torch.float32), VisualPlan((SCATTERED,) * LAYERS))
    batch = make_batch(model, [(5, IMAGE, 4)])
    inputs = batch.to_generate() | {"pixel_values": batch.pixel_values.float()}
    model(**inputs)
    prompt = vis_sparse.inspect(model)
    model.generate(**inputs, max_new_tokens=3)
    seen = vis_sparse.inspect(model)
    assert seen["last_call"].past > 0 == prompt["last_call"].past
    assert (seen["flops"], seen["flops_dense"]) == (prompt["flops"], prompt["flops_dense"])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_counts_no_padding(side):
    """A ragged batch costs what its samples cost, each with the text rows of the longest."""
    model = vis_sparse.patch(make_model(dtype=torch.float32), VisualPlan((SCATTERED,) * LAYERS))
    batch = make_batch(model, [(5, IMAGE, 4), (2, IMAGE, 1, IMAGE, 3), (8,)], side)
    model(**batch.by_ids())
    seen = vis_sparse.inspect(model)
    second = 2 + math.prod(IMAGE) + 1
    layout = VisualLayout.from_grids([[(5, IMAGE)], [(2, IMAGE), (second, IMAGE)], []])
    report = vis_sparse.flops(model, seen["plan"], layout=layout, text_tokens=9)
    assert seen["flops"] == report.total < seen["flops_dense"]


@torch.no_grad()
def test_reports_copies_of_weights():
    model = make_model(dtype=torch.float32)
    batch = make_batch(model, [(5, IMAGE, 4)])
    inputs = batch.by_ids() | {"pixel_values": batch.pixel_values.float()}
    with vis_sparse.patched(model, VisualPlan((LayerPlan(ffn=0.5),) * LAYERS)):
        model(**inputs)
        assert vis_sparse.inspect(model)["extra_bytes"] == 0, "leading neurons are views"
    with vis_sparse.patched(model, VisualPlan((LayerPlan(ffn=tuple(range(1, NEURONS, 2))),) * LAYERS)):
        model(**inputs)
        hidden = model.config.text_config.hidden_size
        # the last layer's visual rows are read by nobody, so it needs no cut
        assert vis_sparse.inspect(model)["extra_bytes"] == (LAYERS - 1) * 3 * hidden * (NEURONS // 2) * 4


def test_unpatched_model_has_nothing_to_say():
    assert vis_sparse.inspect(make_model()) is None
