"""The count: figures in print, pairs by brute force, and FLOPs against what torch counts on the unpatched model."""

import dataclasses
import itertools
import json
import re
from functools import partial

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vis_sparse.cost.flops import flops
from vis_sparse.cost.pairs import left_pairs, neighborhood_pairs
from vis_sparse.cost.report import PARTS
from vis_sparse.cost.shape_lookup import shape_of
from vis_sparse.cost.shapes import ModelShape
from vis_sparse.executor.tokens import left_by_layer
from vis_sparse.layout.image_grids import ShapeError
from vis_sparse.layout.layout import LayoutError, VisualLayout
from vis_sparse.layout.packing import visual_coordinates
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood, PlanError, TokenBudget
from vis_sparse.plans.plan import VisualPlan

TERA = 1e12
SMALL = ModelShape("small", layers=4, hidden=24, heads=6, kv_heads=3, head_dim=8, ffn=40, vocab=50)
# two samples: two images and a clip with text between them; an image first of all
LAYOUT = VisualLayout.from_grids([[(2, (1, 2, 3)), (8, (1, 1, 2)), (11, (2, 2, 2))], [(0, (1, 3, 2))]])
TEXT = 5  # text tokens of each sample


def tera(shape, plan, convention):
    return flops(shape, plan, convention=convention).total / TERA


@pytest.mark.parametrize(
    ("shape", "plan", "convention", "low", "high"),
    [
        # arXiv 2410.06169, tables 1 and 2; the plans must not cost more than the paper's
        ("llava-1.5-7b", "dense", "paper", 7.625, 7.635),
        ("llava-1.5-13b", "dense", "paper", 14.885, 14.895),
        ("llava-1.5-7b", "yopo-25", "paper", 1.80, 1.91),
        ("llava-1.5-13b", "yopo-25", "paper", 3.50, 3.72),
        ("llava-1.5-7b", "yopo-12", "paper", 0.88, 0.93),
        ("llava-1.5-13b", "yopo-12", "paper", 1.70, 1.80),
        # the other conventions for the same model
        ("llava-1.5-7b", "dense", "macs", 3.815, 3.825),
        ("llava-1.5-7b", "dense", "fastv", 2.98, 2.99),
        # with 64 text tokens, 640 in all: 8.4
        ("llava-1.5-7b", "dense", "executed", 8.35, 8.45),
        # FastV's own formula: 2 layers with 576 tokens, 30 with 288
        ("llava-1.5-7b", "fastv", "fastv", 1.56, 1.57),
        # 8 layers each with 576, 288, 144 and 72 tokens
        ("llava-1.5-7b", "pyramiddrop", "paper", 3.55, 3.56),
        # ViCA's own figure is 4 % of the visual compute
        ("llava-1.5-7b", "vica", "paper", 0.30, 0.32),
    ],
)
def test_figures_in_print(shape, plan, convention, low, high):
    assert low <= tera(shape, plan, convention) <= high


def test_the_papers_formula_to_the_last_flop():
    n, d, m = 576, 4096, 11008
    assert flops("llava-1.5-7b", "dense", convention="paper").total == 32 * 2 * (
        4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m
    )
    assert flops("llava-1.5-7b", "dense", convention="fastv").total == 32 * (
        4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    )
    for plan in ("dense", "yopo-25", "vica", "hollow"):
        assert 2 * tera("llava-1.5-7b", plan, "macs") == tera("llava-1.5-7b", plan, "paper")


def test_the_papers_formula_scaled_by_a_plan():
    n, d, m = 576, 4096, 11008
    pairs = brute_pairs(Neighborhood(2, "both"), 1, 24, 24)
    layers = [layer.total for layer in flops("llava-1.5-7b", "yopo-12", convention="paper").prefill.layers]
    assert layers[0] == layers[1] == 2 * (4 * n * d**2 + 2 * pairs * d + 3 * n * d * m // 4)
    assert set(layers[2:16]) == {2 * (4 * n * d * d // 8 + 2 * pairs * d // 8 + 3 * n * d * m // 4)}
    assert set(layers[16:]) == {0}


def test_frozen_rows_pay_for_keys_and_values_only():
    n, d = 576, 4096
    layers = [layer.total for layer in flops("llava-1.5-7b", "vica", convention="paper").prefill.layers]
    assert [i for i, cost in enumerate(layers) if cost] == [0, 1, 7, 8, 9, 10, 11, 14]
    assert {cost for cost in layers if cost} == {2 * 2 * n * d**2}


def test_nominal_counts_do_not_know_the_semantics():
    plan = VisualPlan.yopo(4, layer_cut=2, ffn_ratio=2)
    zero = plan.replace(semantics="zero")
    costs = [flops(SMALL, each, layout=LAYOUT, text_tokens=TEXT, convention="paper") for each in (plan, zero)]
    assert costs[0].total == costs[1].total
    assert [layer.total > 0 for layer in costs[1].prefill.layers] == [True, True, False, False]
    assert costs[0].decode is None


def test_a_layer_without_active_heads_reads_nothing():
    layers = (LayerPlan(), LayerPlan(), LayerPlan(heads=(False,) * 6), LayerPlan(heads=(False,) * 6))
    cost = flops(SMALL, VisualPlan(layers), layout=LAYOUT, text_tokens=TEXT, convention="paper").prefill
    assert [layer.total > 0 for layer in cost.layers] == [True, True, False, False]


def brute_pairs(near, frames, height, width):
    """Query-key pairs by walking the grid, from the definition in words."""
    places = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
    count = 0
    for index, (t, y, x) in enumerate(places):
        top, left = y - y % near.stride, x - x % near.stride
        block = [(top + i, left + j) for i in range(near.stride) for j in range(near.stride)]
        for key, (kt, ky, kx) in enumerate(places):
            close = abs(kt - t) <= near.frames and any(max(abs(ky - b), abs(kx - a)) <= near.radius for b, a in block)
            count += close and (near.direction == "both" or key <= index)
    return count


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


def test_tokens_that_left_by_the_formula():
    n, d, m, last = 576, 4096, 11008, 31
    layers = flops("llava-1.5-7b", "fastv", convention="fastv").prefill.layers
    counts = [n] * 2 + [n // 2] * 30
    assert [layer.total for layer in layers] == [4 * c * d**2 + 2 * c**2 * d + 2 * c * d * m for c in counts]

    report = flops("llava-1.5-7b", "pyramiddrop")
    assert report.visual_left == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    assert report.kv_visual_bytes == 8 * (576 + 288 + 144 + 72) * 2 * 4096 * 2
    left, visual = report.visual_left, [layer.visual for layer in report.prefill.layers]
    assert [lane.ffn for lane in visual] == [2 * 3 * c * d * m for c in left[:last]] + [0]
    assert [lane.scores for lane in visual[:last]] == [4 * d * (c * (c + 1) // 2 + 35 * c) for c in left[:last]]
    # the last text row once more over all keys, without values, in the layers that choose
    chosen = [2 * d * (64 + c) if i in (7, 15, 23) else 0 for i, c in enumerate(left)]
    text = [4 * d * (64 * 65 // 2 + 29 * c) for c in left]
    assert [layer.text.scores for layer in report.prefill.layers] == [a + b for a, b in zip(text, chosen)]
    assert flops("llava-1.5-7b", "random-drop").total == flops("llava-1.5-7b", "fastv").total - 2 * d * (64 + 576)


def test_nobody_leaves_where_nobody_comes_after():
    layers = (LayerPlan(), LayerPlan(tokens=TokenBudget(0.5)), LayerPlan.off(), LayerPlan.off())
    assert flops(SMALL, VisualPlan(layers), layout=LAYOUT, text_tokens=TEXT).visual_left == (LAYOUT.num_visual,) * 4


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
        for t in left_by_layer([each.tokens for each in plan.layers], layout)
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


def counted(forward):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def small_llava():
    text = LlamaConfig(
        hidden_size=24,
        head_dim=8,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=50,
        pad_token_id=0,
    )
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION, image_size=56, patch_size=14))
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def test_dense_is_what_torch_counts_on_the_unpatched_model():
    model = small_llava()
    layout = VisualLayout.from_grids([[(3, (1, 4, 4))]] * 2)
    report = flops(model, "dense", layout=layout, text_tokens=9)
    text = model.model.language_model
    with torch.device("meta"):
        total = counted(lambda: text(inputs_embeds=torch.zeros(2, 25, 24)))
        # older versions of transformers multiply positions and frequencies as matrices
        total -= counted(lambda: text.rotary_emb(torch.zeros(2, 25, 24), torch.arange(25)[None]))
        head = counted(lambda: model.lm_head(torch.zeros(2, 1, 24)))
    # torch runs all n * n scores, we count the causal n(n + 1) / 2
    scores = report.prefill.part("scores")
    assert scores == 2 * 25 * 26 // 2 * 4 * 4 * 6 * 8
    assert report.prefill.total - scores == total - 2 * 25 * 25 * 4 * 4 * 6 * 8
    assert report.prefill.lm_head == head
    assert report.prefill.vision_tower is None  # a layout doesn't say what the tower ran
    assert report.prefill.whole == report.total + head


def test_the_vision_tower_and_the_projector_are_what_torch_counts():
    model = small_llava()
    with torch.device("meta"):
        total = counted(lambda: model.model.get_image_features(pixel_values=torch.zeros(2, 3, 56, 56)))
    prefill = flops(model, "dense", images=2, text_before=3, text_tokens=9).prefill
    assert prefill.vision_tower + prefill.projector == total
    assert prefill.projector == 2 * 32 * (32 * 24 + 24 * 24)

    text = LlamaConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(
            InternVLConfig(text_config=text, vision_config=VISION | {"image_size": [56, 56]})
        )
        total = counted(lambda: model.model.get_image_features(pixel_values=torch.zeros(5, 3, 56, 56)))
    prefill = flops(model, "dense", image_size=(112, 112)).prefill  # four tiles and a thumbnail
    assert prefill.vision_tower + prefill.projector == total


SMALL_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
PLANES = {"rope_parameters": SMALL_TEXT["rope_parameters"] | {"mrope_section": [2, 2, 2]}}
DEPTH = {"depth": 2, "num_heads": 2}


def frames_of_llava(kind, tower, **settings):
    config = getattr(hf, f"{kind}Config")(
        text_config=LlamaConfig(**SMALL_TEXT), vision_config=tower(**VISION, image_size=56, patch_size=14), **settings
    )
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    strategy = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    pixels = torch.zeros(1, 5, 3, 56, 56, device="meta")
    run = model.model.get_video_features
    return model.to("meta"), lambda: run(pixels, vision_feature_layer=-1, **strategy)


def frames_of_qwen(kind, vision):
    config = getattr(hf, f"{kind}Config")(text_config=SMALL_TEXT | PLANES, vision_config=vision | DEPTH)
    model = getattr(hf, f"{kind}ForConditionalGeneration")._from_config(config, attn_implementation="eager")
    tower = config.vision_config
    grid = torch.tensor([[3, 4, 6]])  # five frames, the last twice
    pixels = torch.zeros(3 * 4 * 6, 3 * 2 * tower.patch_size**2)
    return model, lambda: model.model.get_video_features(pixel_values_videos=pixels, video_grid_thw=grid)


@pytest.mark.parametrize(
    ("made", "size"),
    [
        (lambda: frames_of_llava("LlavaNextVideo", CLIPVisionConfig), None),
        (lambda: frames_of_llava("LlavaOnevision", partial(hf.SiglipVisionConfig, vision_use_head=False)), None),
        (lambda: frames_of_qwen("Qwen2VL", {"embed_dim": 32, "hidden_size": 24}), (56, 84)),
        (
            lambda: frames_of_qwen(
                "Qwen3VL",
                {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24, "deepstack_visual_indexes": [0]},
            ),
            (64, 96),
        ),
    ],
    ids=["llava-next-video", "llava-onevision", "qwen2-vl", "qwen3-vl"],
)
def test_the_vision_tower_and_the_projector_of_a_video_are_what_torch_counts(made, size):
    model, forward = made()
    shape = shape_of(model)
    if size:  # frames too small for the bounds stay as they are
        shape = dataclasses.replace(shape, video=dataclasses.replace(shape.video, min_pixels=1))
    prefill = flops(shape, "dense", video_frames=5, image_size=size).prefill
    assert prefill.vision_tower + prefill.projector == counted(forward)


def test_a_video_stands_after_the_images_or_alone():
    video = flops("internvl2-8b", "dense", video_frames=3)
    assert (video.visual_tokens, video.text_tokens) == (3 * 256, 64)
    same = VisualLayout.from_grids([[(35 + 256 * frame, (1, 16, 16)) for frame in range(3)]])
    assert video.prefill.layers == flops("internvl2-8b", "dense", layout=same).prefill.layers
    both = flops("internvl2-8b", "dense", images=2, video_frames=3, image_size=(448, 448), batch=2)
    assert both.visual_tokens == 2 * (2 + 3) * 256
    assert both.prefill.vision_tower * 3 == 10 * video.prefill.vision_tower


def test_the_default_layout():
    report = flops("llava-next-7b", "dense", image_size=(672, 672), text_tokens=50, text_before=20, images=2, batch=3)
    assert (report.visual_tokens, report.text_tokens, report.batch) == (3 * 2 * 2928, 150, 3)
    one = [(20, (1, 24, 24)), (596, (1, 48, 49)), (2948, (1, 24, 24)), (3524, (1, 48, 49))]
    same = flops("llava-next-7b", "dense", layout=VisualLayout.from_grids([one] * 3), text_tokens=50)
    assert same.prefill.layers == report.prefill.layers
    assert report.prefill.vision_tower == 30 * flops("llava-1.5-7b", "dense").prefill.vision_tower


@pytest.mark.parametrize("convention", ["executed", "paper", "macs", "fastv"])
def test_a_batch_is_its_samples(convention):
    one = flops("llava-1.5-7b", "yopo-25", convention=convention)
    four = flops("llava-1.5-7b", "yopo-25", convention=convention, batch=4)
    assert four.total == 4 * one.total
    assert four.kv_bytes == 4 * one.kv_bytes
    assert four.prefill.whole == 4 * one.prefill.whole
    wide = flops(SMALL, "vtw", layout=LAYOUT, text_tokens=TEXT, batch=4, convention=convention)
    assert wide.total == 2 * flops(SMALL, "vtw", layout=LAYOUT, text_tokens=TEXT, convention=convention).total
    assert wide.batch == 4


def test_kv_cache_bytes():
    per_token = 2 * 32 * 128 * 2  # K and V, heads, head_dim, fp16
    dense = flops("llava-1.5-7b", "dense")
    assert (dense.kv_text_bytes, dense.kv_visual_bytes) == (64 * 32 * per_token, 576 * 32 * per_token)
    assert flops("llava-1.5-7b", "vtw").kv_visual_bytes == 576 * 16 * per_token
    assert flops("llava-1.5-7b", "vica").kv_visual_bytes == 576 * 8 * per_token
    assert flops("llava-1.5-7b", "yopo-12").kv_visual_bytes == 576 * (2 + 14 / 8) * per_token
    assert flops("llava-1.5-7b", "dense", kv_dtype_bytes=4).kv_bytes == 2 * dense.kv_bytes
    # grouped KV heads: 4 of 28, and the first 4 query heads of yopo-12 share one
    per_head = 1296 * 2 * 128 * 2
    assert flops("qwen2-vl-7b", "yopo-12").kv_visual_bytes == (2 * 4 + 12 * 1) * per_head
    # keys that only visual tokens of later images read are kept too
    silent = VisualPlan((LayerPlan(), LayerPlan(text_reads=False), LayerPlan(), LayerPlan.off()))
    cost = flops(SMALL, silent, layout=LAYOUT, text_tokens=TEXT)
    assert cost.kv_visual_bytes == LAYOUT.num_visual * 3 * (2 * 3 * 8 * 2)
    # the official code keeps every visual key
    zero = VisualPlan.yopo(32, layer_cut=16, semantics="zero")
    assert flops("llava-1.5-7b", zero).kv_bytes == dense.kv_bytes


def test_a_prompt_without_an_image_costs_its_text():
    report = flops("llava-1.5-7b", "yopo-12", images=0)
    assert report.visual_tokens == report.prefill.lane("visual") == report.kv_visual_bytes == 0
    assert report.total == flops("llava-1.5-7b", "dense", images=0).total


def test_masks_given_by_the_caller_are_counted():
    masks = [[True] * 2 + [False] * 4] * 4
    report = flops(SMALL, "dense", layout=LAYOUT, text_tokens=TEXT, heads=torch.tensor(masks))
    assert report.prefill.layers[0].visual.qkv == 2 * LAYOUT.num_visual * 24 * 8 * (2 + 2 * 1)


def test_the_report_adds_up_and_goes_to_json():
    report = flops("llava-1.5-7b", "yopo-25", executed_scores=10**10)
    prefill = report.prefill
    assert report.total == prefill.total == prefill.lane("visual") + prefill.lane("text")
    assert prefill.total == sum(prefill.part(part) for part in PARTS)
    assert prefill.whole == prefill.total + prefill.vision_tower + prefill.projector + prefill.lm_head
    assert report.score_overhead == 10**10 / prefill.part("scores")
    assert dataclasses.replace(report, executed_scores=None).score_overhead is None
    data = json.loads(json.dumps(report.to_dict()))
    assert data["total"] == report.total
    assert data["kv_bytes"] == report.kv_bytes
    assert data["prefill"]["layers"][3]["text"]["ffn"] == prefill.layers[3].text.ffn
    assert data["prefill"]["by_part"] == {part: prefill.part(part) for part in PARTS}
    assert data["decode"]["by_lane"] == {"visual": 0, "text": report.decode.total}
    assert flops("llava-1.5-7b", "vtw", convention="paper").to_dict()["decode"] is None


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"convention": "tflops"}, PlanError, "convention: got 'tflops', expected one of executed, paper, macs, fastv"),
        ({"plan": VisualPlan.dense(3)}, PlanError, "plan 'dense': got 3 layers, expected the model's 32"),
        ({"plan": "yopo-12", "heads": None}, PlanError, "got the budget {keep: 0.125} and no head scores"),
        ({"text_before": 65}, LayoutError, "text_before: got 65, expected 0 to the 64 text tokens"),
        (
            {"layout": VisualLayout.from_grids([[(65, (1, 1, 1))]])},
            LayoutError,
            "layout: got a segment of sample 0 after 65 text tokens, expected at most the sample's 64",
        ),
        ({"layout": LAYOUT, "batch": 3}, LayoutError, "layout: got a batch of 3, expected a multiple of 2"),
        ({"images": -1}, ShapeError, "images: got -1 of 336 x 336 pixels, expected a count >= 0 and sides >= 1"),
        ({"model": SMALL}, ShapeError, "model: small has no rule from image sizes to visual tokens, expected layout="),
        ({"video_frames": -1}, ShapeError, "video_frames: got -1, expected a count >= 0"),
        ({"video_frames": 8}, ShapeError, "video_frames: got 8, expected 0: llava-1.5-7b has no rule for videos"),
        ({"model": "gpt"}, ShapeError, "model: got 'gpt', expected a folder with a config.json or one of"),
    ],
)
def test_what_is_refused(settings, error, message):
    settings = {"model": "llava-1.5-7b", "plan": "dense"} | settings
    with pytest.raises(error, match=re.escape(message)):
        flops(**settings)
