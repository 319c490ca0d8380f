"""`make figures`: the pictures that are committed are those that the plans give today."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from vis_sparse.cost.flops import flops
from vis_sparse.eval.figures import FIGURES, MARGIN, MODEL, PLANS, drawn, plans

ASSETS = Path(__file__).parents[2] / "docs" / "assets"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.__name__)
def test_committed_pictures_are_what_is_drawn(figure):
    assert (ASSETS / f"{figure.__name__}.svg").read_text(encoding="utf-8") == drawn(figure), "run make figures"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.__name__)
def test_nothing_is_drawn_outside(figure):
    root = ElementTree.fromstring(drawn(figure))
    _, _, width, height = (float(side) for side in root.get("viewBox").split())
    for shape in root.iter(f"{SVG}rect"):
        x, y, wide, tall = (float(shape.get(name)) for name in ("x", "y", "width", "height"))
        assert min(x, y) >= -MARGIN and x + wide <= width - MARGIN and y + tall <= height - MARGIN
    for words in root.iter(f"{SVG}text"):
        assert 0 <= float(words.get("x")) <= width - 2 * MARGIN and 0 <= float(words.get("y")) <= height - 2 * MARGIN


def test_the_picture_of_plans_tells_the_costs_that_are_counted():
    words = {text.text for text in ElementTree.fromstring(drawn(plans)).iter(f"{SVG}text")}
    dense = flops(MODEL, "dense").prefill.lane("visual")
    for name in PLANS:
        report = flops(MODEL, name)
        assert {name, f"{report.prefill.lane('visual') / dense:.0%}", f"{report.kv_bytes / 2**20:.0f} MiB"} <= words
