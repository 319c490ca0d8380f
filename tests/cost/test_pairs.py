"""Query-key pairs and the FLOPs of scores by brute force, and projections by hand."""

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from vis_sparse.cost.flops import flops
from vis_sparse.cost.pairs import left_pairs, neighborhood_pairs
from vis_sparse.cost.report import PARTS
from vis_sparse.executor.tokens import left_by_layer
from vis_sparse.layout.packing import visual_coordinates
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood, TokenBudget
from vis_sparse.plans.plan import VisualPlan

from .small import LAYOUT, SMALL, TEXT, brute_pairs


@given(
    near=st.builds(
        Neighborhood, st.integers(0, 3), st.sampled_from(["causal", "both"]), st.integers(0, 2), st.integers(1, 3)
    ),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
)
def test_neighbourhoods_by_brute_force(near, grid):
    assert neighborhood_pairs(near, *grid) == brute_pairs(near, *grid)


def test_neighbourhood_sizes_of_the_official_grid():
    # sum over 24 positions of a window of 5 cut at the border: 24 * 5 - 2 * (2 + 1) = 114
    assert neighborhood_pairs(Neighborhood(2, "both"), 1, 24, 24) == 114**2
    assert neighborhood_pairs(Neighborhood(2, "causal"), 1, 24, 24) == (114**2 + 576) // 2
    assert neighborhood_pairs(Neighborhood(99, "both"), 1, 24, 24) == 576**2


@given(
    near=st.builds(
        Neighborhood, st.integers(0, 3), st.sampled_from(["causal", "both"]), st.integers(0, 2), st.integers(1, 3)
    ),
    stays=st.lists(st.booleans(), min_size=LAYOUT.num_visual, max_size=LAYOUT.num_visual),
)
def test_neighbourhoods_of_what_is_left_by_brute_force(near, stays):
    tokens = visual_coordinates(LAYOUT).take(stays)
    rows = list(zip(*(a.tolist() for a in (tokens.segment, tokens.frame, tokens.y, tokens.x, tokens.column))))
    count = 0
    for segment, t, y, x, column in rows:
        block = [
            (y - y % near.stride + i, x - x % near.stride + j)
            for i, j in itertools.product(range(near.stride), repeat=2)
        ]
        for other, kt, ky, kx, behind in rows:
            close = other == segment and abs(kt - t) <= near.frames
            close = close and any(max(abs(ky - b), abs(kx - a)) <= near.radius for b, a in block)
            count += close and (near.direction == "both" or behind <= column)
    assert left_pairs(near, LAYOUT, tokens) == count


def tokens_of(layout, sample, text):
    """The sample's sequence: None for a text token, (segment, t, y, x) for a visual one."""
    visual = {}
    for number, s in enumerate(layout.segments):
        if s.sample == sample:
            for i in range(s.size):
                visual[s.start + i] = (number, i // (s.height * s.width), i // s.width % s.height, i % s.width)
    return [visual.get(position) for position in range(text + len(visual))]


def near_enough(attention, query, key):
    if not isinstance(attention, Neighborhood):
        return True
    close = max(abs(query[2] - key[2]), abs(query[3] - key[3])) <= attention.radius
    return query[0] == key[0] and abs(query[1] - key[1]) <= attention.frames and close


def brute_scores(plan, layout, text):
    """Score FLOPs of every layer by asking of each (layer, head, query, key) whether it is read."""
    zero, layers = plan.semantics == "zero", []
    left = [
        set(zip(t.sample.tolist(), t.column.tolist()))
        for t in left_by_layer([each.tokens for each in plan.layers], visual_coordinates(layout))
    ]
    for index, layer in enumerate(plan.layers):
        alive = (
            zero or plan.is_dense or any(later.text_reads and any(later.heads) for later in plan.layers[index + 1 :])
        )
        products = 0
        for sample in range(layout.batch_size):
            tokens = [
                token if token is None or (sample, position) in left[index] else "left"
                for position, token in enumerate(tokens_of(layout, sample, text))
            ]
            for active in layer.heads:
                for q, query in enumerate(tokens):
                    if query == "left" or query and not (alive and active and layer.attention != "none"):
                        continue
                    for k, key in enumerate(tokens):
                        if key == "left":
                            continue
                        both = isinstance(layer.attention, Neighborhood) and layer.attention.direction == "both"
                        if k > q and not (both and query and key):
                            continue
                        if query and key:
                            if near_enough(layer.attention, query, key):
                                products += 1 + (layer.text_reads or not zero)
                        elif key:
                            reads = active and layer.text_reads
                            products += 2 if reads else 1 if zero else 0
                        else:
                            products += 2
        layers.append(2 * SMALL.head_dim * products)
    return layers


masks = st.lists(st.booleans(), min_size=6, max_size=6).map(tuple)
near_plans = st.builds(Neighborhood, st.integers(0, 2), st.sampled_from(["causal", "both"]), st.integers(0, 1))
layer_plans = st.builds(
    LayerPlan, st.booleans(), st.sampled_from(["full", "none"]) | near_plans, masks, st.floats(0, 1)
)
leaving = st.builds(TokenBudget, st.sampled_from([0.2, 0.5, 0.8]), st.sampled_from(["norm", "uniform", "random"]))
four_layers = st.builds(
    VisualPlan, st.lists(layer_plans, min_size=4, max_size=4).map(tuple), semantics=st.sampled_from(["exclude", "zero"])
) | st.lists(st.builds(dataclasses.replace, layer_plans, tokens=st.none() | leaving), min_size=4, max_size=4).map(
    lambda layers: VisualPlan(tuple(layers))
)


@given(four_layers)
def test_executed_scores_by_brute_force(plan):
    report = flops(SMALL, plan, layout=LAYOUT, text_tokens=TEXT)
    assert [layer.visual.scores + layer.text.scores for layer in report.prefill.layers] == brute_scores(
        plan, LAYOUT, TEXT
    )


@given(four_layers)
def test_a_decode_step_is_the_difference_of_a_prefill_one_token_longer(plan):
    shorter, longer = (flops(SMALL, plan, layout=LAYOUT, text_tokens=TEXT + extra) for extra in (0, 1))
    for part in PARTS:
        assert shorter.decode.part(part) == longer.prefill.part(part) - shorter.prefill.part(part)
    assert shorter.decode.lane("visual") == 0


def test_executed_projections_of_a_plan_by_hand():
    near = Neighborhood(1)
    plan = VisualPlan(
        (
            LayerPlan(attention=near, heads=(True, True, False, False, True, False), ffn=0.5),
            LayerPlan(attention="none", heads=(False,) * 5 + (True,), ffn=(0, 1, 7)),
            LayerPlan(attention="none", ffn=0),
            LayerPlan.off(),
        )
    )
    visual, text, d, head = LAYOUT.num_visual, 2 * TEXT, 24, 8
    layers = flops(SMALL, plan, layout=LAYOUT, text_tokens=TEXT).prefill.layers
    assert [layer.visual.qkv for layer in layers] == [
        2 * visual * d * head * units for units in (3 + 2 * 2, 2, 2 * 3, 0)
    ]
    assert [layer.visual.out for layer in layers] == [2 * visual * d * head * 3, 0, 0, 0]
    assert [layer.visual.ffn for layer in layers] == [2 * 3 * visual * d * neurons for neurons in (20, 3, 0, 0)]
    for layer in layers:
        assert layer.text.qkv == 2 * text * d * head * (6 + 2 * 3)
        assert layer.text.out == 2 * text * d * head * 6
        assert layer.text.ffn == 2 * 3 * text * d * 40
