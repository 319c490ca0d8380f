"""The report of a count: prompts and batches, bytes of the cache, JSON, and what is refused."""

import dataclasses
import json
import re

import pytest
import torch

from vis_sparse.cost.flops import flops
from vis_sparse.cost.report import PARTS
from vis_sparse.layout.image_grids import ShapeError
from vis_sparse.layout.layout import LayoutError, VisualLayout
from vis_sparse.plans.layer_plan import LayerPlan, PlanError
from vis_sparse.plans.plan import VisualPlan

from .small import LAYOUT, SMALL, TEXT


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
