"""The demo's figures, page and picture, on a handful of questions."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import vis_sparse
from vis_sparse.cost.flops import resolved
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.eval import demo
from vis_sparse.eval.layer_work import layer_work, outline, runs_in_words
from vis_sparse.eval.measure import Measurement
from vis_sparse.eval.numbers import three_digits
from vis_sparse.eval.page import page
from vis_sparse.eval.picture import PIXELS, halftone, picture
from vis_sparse.eval.tiny import NAMES, checkpoint
from vis_sparse.eval.tiny.data import questions
from vis_sparse.eval.tiny.families import FAMILIES
from vis_sparse.eval.tiny.score import prepared
from vis_sparse.plans.budgets import resolve_heads

TOWERS_MEASURED = ("llava", "qwen2_vl")  # by the calibrations that come with the models
KINDS = {"easy_vqa", "place", "count", "exists"}


@pytest.fixture(scope="module", params=NAMES)
def results(request):
    before = demo.REPEATS, demo.TIMED
    demo.REPEATS, demo.TIMED = 1, 2
    yield demo.run_demo(8, request.param)
    demo.REPEATS, demo.TIMED = before


def test_figures_are_complete_and_consistent(results):
    plans = ["dense", "auto", "yopo-25", "yopo-12"]
    of_tower = ["whole-50"] if results["model"]["family"] in TOWERS_MEASURED else []
    assert [row["plan"] for row in results["plans"]] == plans + of_tower
    assert results["questions"] == dict.fromkeys(results["questions"], 2) and set(results["questions"]) == KINDS
    dense = results["plans"][0]
    assert dense["same_as_dense"] == dense["speedup"] == dense["decoder_speedup"] == 1
    of_decoder = results["plans"][:4]
    for row, cheaper in zip(of_decoder, of_decoder[1:], strict=False):
        for cost in ("flops_visual", "flops", "decoder_flops", "kv_bytes"):
            keeps_every_read = cost == "kv_bytes" and cheaper["plan"] == "auto"
            assert row[cost] == cheaper[cost] if keeps_every_read else row[cost] > cheaper[cost]
    outside = {row["plan"]: row["flops"] - row["decoder_flops"] for row in results["plans"]}
    assert outside["dense"] == outside["yopo-12"] > 0
    assert all(0 < outside[name] < outside["dense"] for name in of_tower), "the others leave the tower alone"
    for row in results["plans"]:
        assert row["prefill_s"] > row["decoder_prefill_s"] > 0
        assert set(row["accuracy"]) == KINDS
        share = sum(layer["share"] for layer in row["layers"]) / len(row["layers"])
        assert share == pytest.approx(row["flops_visual"] / dense["flops_visual"], rel=1e-3)
    assert {example["kind"] for example in results["examples"]} == KINDS
    assert all(set(example["given"]) >= {"dense", "blind"} for example in results["examples"])


class _Page(html.parser.HTMLParser):
    """Collects what a page loads or links to, checks that tags close, and counts tables and their captions."""

    VOID = {"meta", "img", "br", "rect", "path", "use", "image", "input"}

    def __init__(self, text):
        super().__init__()
        self.references, self.open, self.seen = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_one_well_formed_file(results):
    text = page(results)
    parsed = _Page(text)
    assert not parsed.open
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in parsed.references)
    assert not re.search(r"https?://|@import|url\((?!#)|<script|<link", text)
    assert parsed.seen.count("table") == parsed.seen.count("caption") > 2
    assert results["model"]["name"] in text and f"--family {results['model']['family']}" in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_page_escapes_what_the_model_says(results):
    example = results["examples"][0]
    told = {**example, "question": "<b>?", "given": {"dense": "<script>"}}
    text = page({**results, "examples": [told, *results["examples"][1:]]})
    assert "<script>" not in text and "&lt;script&gt;" in text and "&lt;b&gt;?" in text


def test_picture_is_written(results, tmp_path):
    picture(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_examples_are_the_images_asked_about(results):
    sizes = FAMILIES[results["model"]["family"]].SIZES
    for example in results["examples"]:
        png = Image.open(io.BytesIO(base64.b64decode(example["image_png"])))
        asked = questions(example["kind"], 2, sizes=sizes)
        assert (png.tobytes(), example["question"]) in [(question.image.tobytes(), question.text) for question in asked]
        assert list(png.size) == example["image_size"]
    shapes = {tuple(example["image_size"]) for example in results["examples"]}
    assert len(shapes) == (2 if sizes else 1)


def test_halftone_opens_the_share_of_each_token():
    image = np.ones((8, 8, 3))
    for share in (0, 0.25, 1):
        drawn = halftone(image, share, 2, 2)
        assert drawn.shape == (2 * PIXELS, 2 * PIXELS, 3)
        assert (drawn == 1).all(-1).mean() == pytest.approx(share, abs=0.01)


def test_outline_of_cells():
    assert outline([], 4) == []
    assert outline([5], 4) == [(1, 1, 1, 2), (1, 1, 2, 1), (1, 2, 2, 2), (2, 1, 2, 2)]
    assert len(outline([0, 1, 4, 5], 4)) == 8


def test_layers_in_words():
    shape = load_shape("llava-1.5-7b")
    layout = vis_sparse.VisualLayout.from_grids([[(35, (1, 24, 24))]])
    plan = resolve_heads(vis_sparse.load_plan("yopo-12").resolve(32), 32, 32, "first")
    layers = layer_work(shape, plan, layout, 64)
    assert runs_in_words(layers).startswith("0-1: 5×5, 25% of FFN; 2-14: 5×5, 12% of heads, 25% of FFN; 15: frozen")
    assert runs_in_words(layers).endswith("16-31: off")
    assert len(layers[2]["seen"]) == 25 and layers[31]["seen"] == []


@pytest.mark.parametrize(
    "name, grids, around",
    [("llava", [(12, 12)], 11), ("qwen2_vl", [(12, 14)], 13), ("internvl", [(6, 6)] * 5, 13)],
)
def test_timed_prompt_is_what_the_model_gets(name, grids, around):
    family, folder = FAMILIES[name], checkpoint(name)
    model = family.MODEL.from_pretrained(folder, dtype=torch.float32).eval()
    asked = questions("place", 2, sizes=family.SIZES[-1:])
    width, height = asked[0].image.size
    inputs = prepared(model, AutoProcessor.from_pretrained(folder), asked)
    measured = Measurement(model, inputs, (height, width), {"auto": resolved("auto", load_shape(folder), None)})
    assert [(segment.height, segment.width) for segment in measured.layout.segments] == grids * 2
    assert measured.text_tokens == around
    figures = measured.run(1)["auto"]
    assert figures["flops"] > figures["decoder_flops"] + figures["tower_flops"]


def test_numbers_have_three_digits():
    assert [three_digits(value) for value in (1234.5, 123.4, 12.34, 1.234)] == ["1,234", "123", "12.3", "1.23"]
