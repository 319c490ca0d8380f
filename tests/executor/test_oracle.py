"""The oracle itself: against transformers where a plan is dense, against a window spelled out query by query, and
that every field of a plan moves its logits by far more than any tolerance here."""

import itertools
from dataclasses import replace

import pytest
import torch

from vis_sparse.layout.layout import VisualLayout
from vis_sparse.plans.layer_plan import TOKEN_ORDERS, LayerPlan, Neighborhood, TokenBudget
from vis_sparse.plans.plan import VisualPlan

from .. import oracle
from ..models import HEADS, IMAGE, LAYERS, TEXT_MODELS, make_batch, make_model

SAMPLES = ((5, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (7,))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_dense_plan_is_the_transformers_model(text, padding):
    model = make_model(text)
    batch = make_batch(model, SAMPLES, padding)
    with torch.no_grad():
        expected = model(**batch.by_ids(), output_hidden_states=True)
        plan = VisualPlan.dense(LAYERS)
        states = oracle.hidden_states(
            model.model.language_model, plan, batch.layout, batch.embeds, batch.attention_mask
        )
        logits = oracle.logits(model, plan, batch.layout, batch.embeds, batch.attention_mask)
    real = batch.attention_mask.bool()
    for ours, theirs in zip(states, expected.hidden_states, strict=True):
        # transformers computes its norms in float32 whatever the dtype
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=2e-5)
    torch.testing.assert_close(logits[real], expected.logits[real], rtol=0, atol=2e-5)


def window(near: Neighborhood, frames: int, height: int, width: int) -> torch.Tensor:
    """The neighbourhood spelled out: a query sees what any query of its block sees, at or before itself if causal."""
    places = list(itertools.product(range(frames), range(height), range(width)))
    keys = torch.zeros(len(places), len(places), dtype=torch.bool)
    for (q, (tq, yq, xq)), (k, (tk, yk, xk)) in itertools.product(enumerate(places), repeat=2):
        block = [
            (y, x)
            for y in range(height)
            for x in range(width)
            if y // near.stride == yq // near.stride and x // near.stride == xq // near.stride
        ]
        close = any(abs(yk - y) <= near.radius and abs(xk - x) <= near.radius for y, x in block)
        in_time = abs(tq - tk) <= near.frames
        keys[q, k] = close and in_time and (near.direction == "both" or k <= q)
    return keys


@pytest.mark.parametrize("grid", [(1, 3, 5), (2, 4, 4), (1, 7, 2), (3, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("direction", ["causal", "both"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_windows(grid, direction, stride):
    layout = VisualLayout.from_grids([[(2, grid), (2 + grid[0] * grid[1] * grid[2], (1, 2, 3))]])
    size = layout.segments[0].size
    places = oracle.grid_of(layout, 2 + size + 6 + 1)
    for radius, frames in itertools.product([0, 1, 2], [0, 1]):
        near = Neighborhood(radius, direction, frames, stride)
        keys = oracle.near_keys(near, places)[0]
        assert torch.equal(keys[2 : 2 + size, 2 : 2 + size], window(near, *grid))
        assert not keys[2 : 2 + size, 2 + size :].any(), "a neighbourhood ends with its segment"
        assert not keys[:2].any() and not keys[:, :2].any()


CHANGES = {
    "text_reads": dict(text_reads=False),
    "attention-none": dict(attention="none"),
    "attention-near": dict(attention=Neighborhood(1)),
    "direction": dict(attention=Neighborhood(1, "both")),
    "stride": dict(attention=Neighborhood(1, "causal", 0, 2)),
    "heads": dict(heads=(False,) + (True,) * (HEADS - 1)),
    "ffn-share": dict(ffn=0.5),
    "ffn-none": dict(ffn=0.0),
    "ffn-indices": dict(ffn=tuple(range(1, 25))),
}
TOKENS = {f"tokens-{by}": dict(tokens=TokenBudget(0.5, by)) for by in TOKEN_ORDERS}


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
def test_every_field_moves_the_text_logits(semantics):
    model = make_model()
    batch = make_batch(model, [(5, IMAGE, 4)])

    def logits(changes):
        layers = list(VisualPlan.dense(LAYERS).layers)
        layers[0] = replace(LayerPlan(), **changes)
        with torch.no_grad():
            return oracle.logits(model, VisualPlan(tuple(layers), semantics=semantics), batch.layout, batch.embeds)

    changes = CHANGES | (TOKENS if semantics == "exclude" else {}) | {"dense": {}}
    rows = {name: logits(fields)[0, -1] for name, fields in changes.items()}
    for one, other in itertools.combinations(rows, 2):
        assert (rows[one] - rows[other]).abs().max() > 1e-2, (one, other)


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
def test_unread_visual_rows(semantics):
    """What visual rows compute after their last use reaches no text row, but under "zero" by the denominators."""
    model = make_model()
    batch = make_batch(model, [(5, IMAGE, 4)])
    text = batch.input_ids[0] != model.config.image_token_id
    unread = [(LayerPlan(), LayerPlan(False, ffn=share), LayerPlan(False)) for share in (1.0, 0.5)]
    with torch.no_grad():
        one, other = (
            oracle.logits(model, VisualPlan(layers, semantics=semantics), batch.layout, batch.embeds)[0, text]
            for layers in unread
        )
    moved = (one - other).abs().max()
    assert moved == 0 if semantics == "exclude" else moved > 1e-3
