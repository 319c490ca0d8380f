"""An operation saved is an operation never dispatched: what a patched model dispatches, and the FLOPs it executes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vis_sparse
from vis_sparse.eval.launches import Launches
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.plans.budgets import resolve_heads
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood, TokenBudget
from vis_sparse.plans.plan import VisualPlan

from ..marks import slow_but
from ..models import HEADS, IMAGE, extended, make_batch, make_model

HALF = (True, False) * (HEADS // 2)
NEAR = Neighborhood(1, "both")
# layers in which both lanes have something to compute
BOTH = {
    "dense": LayerPlan(),
    "near": LayerPlan(attention=NEAR),
    "heads": LayerPlan(heads=HALF),
    "yopo": LayerPlan(attention=NEAR, heads=HALF, ffn=0.25),
    "frozen": LayerPlan(attention="none", ffn=0.0),
    "skip": LayerPlan(attention="none"),
    "neurons": LayerPlan(attention=NEAR, ffn=tuple(range(1, 20))),
}
BATCHES = {"one": ((5, IMAGE, 4),), "padded": ((5, IMAGE, 4), (2, IMAGE, 3), (7,))}
every_text = pytest.mark.parametrize("text", slow_but(["llama-gqa"], ["llama", "llama-gqa"]))
every_batch = pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)


def call_of(batch) -> dict:
    call = batch.by_ids()
    # as `generate` calls: no mask if nothing is padded
    return call | dict(attention_mask=None) if batch.attention_mask.all() else call


@torch.no_grad()
def prefill_counts(text, samples, layers: int, plan=None) -> tuple[int, int]:
    model = make_model(text, dtype=torch.float32, num_hidden_layers=layers)
    batch = make_batch(model, samples)
    if plan is not None:
        vis_sparse.patch(model, plan)
    model(**call_of(batch))  # weights are cut and tables made in the first call
    with Launches() as counted:
        model(**call_of(batch))
    return counted.totals()


def per_layer(text, samples, plan_of=lambda layers: None) -> tuple[float, float]:
    """Operations of one more layer, so that what comes before and after the layers drops out."""
    few, many = (prefill_counts(text, samples, layers, plan_of(layers)) for layers in (2, 6))
    return tuple((b - a) / 4 for a, b in zip(few, many, strict=True))


def report(record_property, name, ours, dense):
    """Both counts into the test report, and as ratios on stdout (`pytest -s`)."""
    ratios = [a / b for a, b in zip(ours, dense, strict=True)]
    record_property(name, {"ops": ours, "dense": dense})
    print(f"\n{name}: {ours[0]:g} operations ({ratios[0]:.2f} of dense), with views {ours[1]:g} ({ratios[1]:.2f})")
    return ratios


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
@pytest.mark.parametrize("kind", BOTH)
@every_batch
@every_text
def test_layers_with_both_lanes(text, samples, kind, semantics, record_property):
    ours = per_layer(text, samples, lambda layers: VisualPlan((BOTH[kind],) * layers, semantics=semantics))
    without_views, _ = report(record_property, f"{kind}, {semantics}", ours, per_layer(text, samples))
    assert without_views <= 1.7


@every_batch
@every_text
def test_layers_with_text_only(text, samples, record_property):
    ours = per_layer(text, samples, lambda layers: VisualPlan((BOTH["yopo"],) + (LayerPlan.off(),) * (layers - 1)))
    without_views, _ = report(record_property, "off", ours, per_layer(text, samples))
    assert without_views <= 1


@pytest.mark.parametrize("kind", BOTH)
@every_batch
@every_text
@torch.no_grad()
def test_decode_step(text, samples, kind, record_property):
    """The whole step, tables included: every step has its own."""
    totals = []
    for plan in (None, VisualPlan((BOTH[kind],) * 6)):
        model = make_model(text, dtype=torch.float32, num_hidden_layers=6)
        batch = make_batch(model, samples)
        longer = extended(model, batch, 3)
        if plan is not None:
            vis_sparse.patch(model, plan)
        cache = model(**call_of(batch), use_cache=True).past_key_values
        for end in range(batch.length + 1, longer.length + 1):
            mask = None if batch.attention_mask.all() else longer.attention_mask[:, :end]
            with Launches() as counted:
                model(
                    input_ids=longer.input_ids[:, end - 1 : end],
                    attention_mask=mask,
                    position_ids=longer.position_ids[:, end - 1 : end],
                    past_key_values=cache,
                )
        totals.append(counted.totals())
    without_views, _ = report(record_property, kind, totals[1], totals[0])
    assert without_views <= 1.2


# FLOPs of the executed graph, at full size on the meta device: no weights, no arithmetic

NAME, LAYERS = "llava-1.5-7b", 32
LAYOUT, TEXT = VisualLayout.from_grids([[(35, (1, 24, 24))]]), 64
SHAPE = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=LAYERS,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
)
PLANS = {
    name: resolve_heads(vis_sparse.load_plan(name).resolve(LAYERS), 32, 32, "first") for name in vis_sparse.plan_names()
} | {
    "scattered": VisualPlan.yopo(LAYERS, 5, 20, [[h % 3 == i % 3 for h in range(32)] for i in range(LAYERS)], 3),
    "neurons": VisualPlan((LayerPlan(attention=NEAR, ffn=tuple(range(7, 3007))),) * LAYERS),
    "near, fewer": VisualPlan(
        tuple(LayerPlan(attention=NEAR, tokens=TokenBudget(0.7, "norm" if i % 2 else "uniform")) for i in range(LAYERS))
    ),
    "sub-grid": VisualPlan.fastv(LAYERS, 3, 0.3, "stride"),
}


@pytest.fixture(scope="module")
def full_size():
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        text_config=LlamaConfig(**SHAPE), vision_config=CLIPVisionConfig(**vision, image_size=336, patch_size=14)
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def matrix_flops(counter: FlopCounterMode) -> int:
    """Of projections and FFN; attention's own products run in batches or in a fused kernel."""
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def plans_to_count():
    for name, plan in PLANS.items():
        marks = () if name in ("yopo-12", "near, fewer") else pytest.mark.slow
        # tokens that leave are refused under "zero"
        for semantics in ("exclude",) if any(layer.tokens for layer in plan.layers) else ("exclude", "zero"):
            yield pytest.param(name, semantics, marks=marks)


@pytest.mark.parametrize("name, semantics", list(plans_to_count()))
@torch.no_grad()
def test_flops_are_the_counted_ones(full_size, name, semantics):
    plan = PLANS[name].replace(semantics=semantics)
    report = vis_sparse.flops(NAME, plan, layout=LAYOUT, text_tokens=TEXT, convention="executed")
    with vis_sparse.patched(full_size, plan, heads="first"), vis_sparse.use_layout(full_size, LAYOUT):
        text_model = full_size.model.language_model
        with FlopCounterMode(display=False) as prefill:
            prompt = torch.empty(1, TEXT + LAYOUT.num_visual, 4096, device="meta")
            cache = text_model(inputs_embeds=prompt, use_cache=True).past_key_values
        with FlopCounterMode(display=False) as decode:
            text_model(inputs_embeds=torch.empty(1, 1, 4096, device="meta"), past_key_values=cache)
    for counter, counted in ((prefill, report.prefill), (decode, report.decode)):
        assert matrix_flops(counter) == sum(counted.part(part) for part in ("qkv", "out", "ffn"))
    # no backend computes fewer scores than are read
    assert prefill.get_total_flops() - matrix_flops(prefill) >= report.prefill.part("scores") > 0
