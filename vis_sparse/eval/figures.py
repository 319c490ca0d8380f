"""`make figures`: the pictures of README and docs, drawn from the plans, the cost model and the kernels' own patterns.

`python -m vis_sparse.eval.figures --out docs/assets` writes each one as SVG, in the colours of the page's scheme.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from ..cost.flops import flops
from ..cost.report import LaneCost
from ..cost.shape_lookup import load_shape
from ..kernels.patterns import visible
from ..layout.layout import VisualLayout
from ..layout.packing import visual_coordinates
from ..plans.budgets import resolve_heads
from ..plans.files import as_plan, plan_names
from ..plans.layer_plan import Neighborhood
from ..plans.schedule import LayerWork, schedule
from .charts import free_height
from .deep.answers import Answers
from .deep.front import BLIND, DENSE
from .deep.tables import ANSWERS
from .layer_work import outline
from .tiny import checkpoint

# Colours are named by what they say.
PALETTES = {
    "light": {
        "page": "#ffffff",
        "ink": "#1d2126", "quiet": "#59636e", "line": "#c4ccd4", "none": "#e7ebef",
        "visual": "#0a7c72", "scores": "#d9480f", "projections": "#4c9be8", "text": "#8a63d2",
    },
    "dark": {
        "page": "#161b22",
        "ink": "#e6edf3", "quiet": "#a2abb5", "line": "#4b545e", "none": "#2b323a",
        "visual": "#35b5a7", "scores": "#ff8a4c", "projections": "#5aa9f5", "text": "#b294f0",
    },
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"
MARGIN = 14
MODEL, PLANS = "llava-1.5-7b", ("dense", "auto", "yopo-25", "yopo-12")
TINY_PLAN = "yopo-25"


class Drawing:
    """An SVG of `width` x `height` pixels and a margin. Colours are names in PALETTES."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{fill}"/>')

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'class="line-edge" stroke-dasharray="3 3"/>'
        )

    def squares(self, corners: Sequence[tuple[float, float]], side: float, fill: str) -> None:
        steps = "".join(f"M{x:g} {y:g}h{side:g}v{side:g}h-{side:g}z" for x, y in corners)
        self.parts.append(f'<path d="{steps}" class="{fill}"/>')

    def lines(self, lines: Sequence[Sequence[tuple[float, float]]], color: str) -> None:
        steps = "".join("M" + "L".join(f"{x:g} {y:g}" for x, y in points) for points in lines)
        self.parts.append(f'<path d="{steps}" class="{color}-edge"/>')

    def arrow(self, x: float, start: float, end: float, color: str) -> None:
        """A vertical arrow from (x, start) to (x, end)."""
        head = 5 if end > start else -5
        self.lines([[(x, start), (x, end - head)]], color)
        self.parts.append(f'<path d="M{x:g} {end:g}l-4 {-head:g}h8z" class="{color}"/>')

    def text(self, x: float, y: float, words: str, color: str = "ink", size: int = 14, anchor="start", bold=False):
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight} class="{color}">'
            f"{escape(words)}</text>"
        )

    def key(self, x: float, y: float, entries: Sequence[tuple[str, str, float]]) -> None:
        """A legend in a row: (colour, words, room)."""
        for color, words, room in entries:
            self.rect(x, y - 10, 11, 11, color)
            self.text(x + 17, y, words, "quiet", 13)
            x += room

    def svg(self, label: str) -> str:
        box = f"{-MARGIN} {-MARGIN} {self.width + 2 * MARGIN:g} {self.height + 2 * MARGIN:g}"
        width, height = box.split()[2:]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{width}" height="{height}" '
            f'font-family="{FONT}" role="img" aria-label="{escape(label)}">\n<style>{_styles("light")}\n'
            f"@media (prefers-color-scheme: dark) {{{_styles('dark')}}}</style>\n"
            f'<rect x="{-MARGIN}" y="{-MARGIN}" width="{width}" height="{height}" rx="8" class="page"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def _styles(scheme: str) -> str:
    colors = PALETTES[scheme].items()
    return " ".join(f".{name}{{fill:{c}}} .{name}-edge{{fill:none;stroke:{c};stroke-width:1.5}}" for name, c in colors)


def tokens(drawing: Drawing, x: float, y: float, cell: float, side: int, attention) -> None:
    """A grid of visual tokens; those that the one in the middle attends to are filled."""
    grid = visual_coordinates(VisualLayout.from_grids([[(0, (1, side, side))]]))
    middle = side // 2 * side + side // 2
    seen = [] if attention == "none" else np.flatnonzero(visible(attention, grid.take([middle]), grid)).tolist()
    gap = 1.5
    for fill, chosen in (
        ("none", set(range(side * side)) - {*seen, middle}),
        ("visual", {*seen} - {middle}),
        ("scores", {middle}),
    ):
        drawing.squares([(x + i % side * cell, y + i // side * cell) for i in sorted(chosen)], cell - gap, fill)
    dx, dy = x - gap / 2, y - gap / 2
    edges = outline(seen, side)
    drawing.lines([[(dx + a * cell, dy + b * cell), (dx + c * cell, dy + d * cell)] for a, b, c, d in edges], "scores")


def plans(drawing: Drawing) -> str:
    """Plans side by side: the work for the visual tokens in each layer of a full-size model."""
    shape = load_shape(MODEL)
    reports = {name: flops(shape, name) for name in PLANS}
    dense = reports["dense"]
    highest = max(layer.visual.total for layer in dense.prefill.layers)
    left, step, tall, row = 210, 14.5, 66, 112
    drawing.text(0, 18, f"LLaVA-1.5-7B: what the {dense.visual_tokens} visual tokens of an image compute", bold=True)
    drawing.text(left, 42, f"layers 0 to {shape.layers - 1}, FLOPs", "quiet", 13)
    drawing.text(left + step * shape.layers + 24, 42, "share, KV cache", "quiet", 13)
    for index, (name, report) in enumerate(reports.items()):
        top = 56 + row * index
        tokens(drawing, 0, top, 6.6, 11, as_plan(name, shape.layers).layers[0].attention)
        drawing.text(86, top + 16, name, bold=True, size=16)
        for line, words in enumerate(_in_words(name)):
            drawing.text(86, top + 36 + 17 * line, words, "quiet", 13)
        for layer, cost in enumerate(report.prefill.layers):
            _bar(drawing, left + step * layer, top + tall, step - 2.5, tall / highest, cost.visual)
        drawing.lines([[(left, top + tall + 0.5), (left + step * shape.layers - 2.5, top + tall + 0.5)]], "line")
        for layer, work in enumerate(_schedule(shape, name)):
            drawing.rect(left + step * layer, top + tall + 4, step - 2.5, 4, "text" if work.reads else "none")
        right = left + step * shape.layers + 24
        share = report.prefill.lane("visual") / dense.prefill.lane("visual")
        drawing.text(right, top + 30, f"{share:.0%}", bold=True, size=20)
        drawing.text(right, top + 54, f"{report.kv_bytes / 2**20:.0f} MiB", "quiet", 14)
    low = 56 + row * len(reports) + 4
    drawing.key(0, low, [("scores", "attention scores", 140), ("projections", "Q, K, V, output", 140),
                         ("visual", "FFN", 64), ("text", "text reads them", 140)])  # fmt: skip
    drawing.text(490, low, "left: what the marked token attends to, layer 0", "quiet", 13)
    return "Visual FLOPs by layer under four plans"


def _bar(drawing: Drawing, x: float, bottom: float, width: float, scale: float, cost: LaneCost) -> None:
    for amount, color in ((cost.ffn, "visual"), (cost.qkv + cost.out, "projections"), (cost.scores, "scores")):
        height = amount * scale
        bottom -= height
        if amount:
            drawing.rect(x, bottom, width, height, color)


def _in_words(name: str) -> tuple[str, str, str]:
    return {
        "dense": ("the model", "as it is", ""),
        "auto": ("as the model,", "gone in the", "last tenth"),
        "yopo-25": ("half the FFN,", "45 % of heads,", "half the layers"),
        "yopo-12": ("1/4 of the FFN,", "1/8 of heads,", "half the layers"),
    }[name]


def _schedule(shape, name: str) -> tuple[LayerWork, ...]:
    plan = resolve_heads(as_plan(name, shape.layers), shape.heads, shape.kv_heads, "first")
    return schedule(plan, shape.heads, shape.kv_heads, shape.ffn)


def attention(drawing: Drawing) -> str:
    """The field `attention`, drawn on a small grid."""
    kinds = (
        ("full", "full"),
        ("{radius: 2}", Neighborhood(2)),
        ("{radius: 2, direction: both}", Neighborhood(2, "both")),
        ("none", "none"),
    )
    for index, (words, kind) in enumerate(kinds):
        tokens(drawing, 196 * index, 34, 17, 9, kind)
        drawing.text(196 * index, 20, words, size=12, bold=True)
    drawing.key(0, 216, [("scores", "the query", 110), ("visual", "what it reads", 130)])
    return "What a visual token attends to under full, causal and two-sided neighbourhoods, and none"


def layout(drawing: Drawing) -> str:
    """Positions of a sequence, and the grid that a stretch of them is."""
    before, rows, columns, after, cell = 4, 3, 4, 5, 30
    drawing.text(0, 18, f"VisualLayout.from_grids([[({before}, (1, {rows}, {columns}))]])", bold=True)
    for position in range(before + rows * columns + after):
        is_visual = before <= position < before + rows * columns
        drawing.rect(position * cell, 34, cell - 3, 34, "visual" if is_visual else "text")
        drawing.text(position * cell + (cell - 3) / 2, 84, str(position), "quiet", 12, "middle")
    drawing.text(0, 112, "text", "text", 14, bold=True)
    start, end = before * cell, (before + rows * columns) * cell - 3
    drawing.lines([[(start, 92), (start, 98), (end, 98), (end, 92)]], "visual")
    drawing.arrow((start + end) / 2, 98, 124, "visual")
    left = (start + end) / 2 - columns * 22
    for line, words in enumerate(("one segment:", f"1 frame, {rows} rows,", f"{columns} columns")):
        drawing.text(left + columns * 44 + 16, 160 + 20 * line, words, "visual", 14, bold=True)
    for index in range(rows * columns):
        x, y = left + index % columns * 44, 132 + index // columns * 34
        drawing.rect(x, y, 41, 31, "visual")
        drawing.text(x + 20.5, y + 20, str(before + index), "none", 13, "middle", bold=True)
    drawing.text(left - 12, 132 + 56, "y", "quiet", 14, "end")
    drawing.text(left + columns * 22, 132 + rows * 34 + 16, "x", "quiet", 14, "middle")
    drawing.text(end + 3, 112, "text", "text", 14, bold=True)
    return "A sequence of text and visual positions, and the grid of the visual ones"


def lanes(drawing: Drawing) -> str:
    """The rows of a call, split once, through the layers of the tiny LLaVA, merged once."""
    shape = load_shape(checkpoint())
    report = {name: flops(shape, name, text_tokens=14, text_before=2) for name in ("dense", TINY_PLAN)}
    whole = report["dense"].prefill.layers[0].visual.total
    first, step, text_y, visual_y, thick = 170, 62, 60, 210, 90
    last = first + step * shape.layers
    drawing.text(0, 18, f"{TINY_PLAN} on the tiny LLaVA: {shape.layers} layers, an image of 144 tokens", bold=True)
    for index, kind in enumerate("TTVVVVVVVVTTTT"):
        drawing.rect(0 + index * 7, 118, 5.5, 46, "visual" if kind == "V" else "text")
        drawing.rect(last + 60 + index * 7, 118, 5.5, 46, "visual" if kind == "V" else "text")
    drawing.text(49, 182, "hidden states", "quiet", 13, "middle")
    drawing.text(last + 109, 182, "merged once", "quiet", 13, "middle")
    for start, end in ((104, first - 6), (last + 54, last + 6)):
        drawing.lines([[(start, 141), (end, text_y + 15)]], "text")
        drawing.lines([[(start, 141), (end, visual_y + thick / 2)]], "visual")
    drawing.text(first, text_y - 12, "text lane", "text", bold=True)
    drawing.text(first, visual_y + thick + 40, "visual lane: packed rows, no padding; height: share of the layer's "
                 "dense work", "visual", 13, bold=True)  # fmt: skip
    for layer, (work, cost) in enumerate(
        zip(_schedule(shape, TINY_PLAN), report[TINY_PLAN].prefill.layers, strict=True)
    ):
        x = first + step * layer
        drawing.rect(x, text_y, step - 6, 30, "text")
        share = cost.visual.total / whole
        if share:
            drawing.rect(x, visual_y + thick * (1 - share) / 2, step - 6, thick * share, "visual")
        else:
            drawing.frame(x, visual_y + thick / 2 - 8, step - 6, 16)
        if work.reads:
            drawing.arrow(x + step / 2 - 3, visual_y + thick * (1 - share) / 2 - 4, text_y + 34, "scores")
        drawing.text(x + step / 2 - 3, visual_y + thick + 18, f"{share:.0%}", "quiet", 13, "middle")
    drawing.text(first + step * 4 + 8, 156, "text reads K and V of the visual rows:", "scores", 13)
    drawing.text(first + step * 4 + 8, 173, "the arrows. After the last arrow the", "scores", 13)
    drawing.text(first + step * 4 + 8, 190, "visual rows compute nothing.", "scores", 13)
    return "Text rows and visual rows apart through the layers, merged at the end"


def cache(drawing: Drawing) -> str:
    """What the KV cache keeps, by layer and KV head."""
    shape = load_shape(checkpoint())
    for place, name in enumerate(("dense", TINY_PLAN)):
        report = flops(shape, name, text_tokens=14, text_before=2, kv_dtype_bytes=4)
        left, cell = 400 * place, 34
        drawing.text(left, 18, f"{name}: {report.kv_bytes / 2**10:.0f} KiB", bold=True)
        for layer, work in enumerate(_schedule(shape, name)):
            drawing.text(left + 52 + layer * cell + cell / 2, 44, str(layer), "quiet", 12, "middle")
            for head in range(shape.kv_heads):
                x, y = left + 52 + layer * cell, 52 + head * 21
                keeps = work.stores and head in work.key_heads
                drawing.rect(x, y, cell - 4, 17, "visual" if keeps else "none")
                drawing.rect(x, y, 5, 17, "text")
        drawing.text(left, 44, "layer", "quiet", 12)
        drawing.text(left, 52 + 13, "head", "quiet", 12)
        for head in range(shape.kv_heads):
            drawing.text(left + 44, 52 + head * 21 + 13, str(head), "quiet", 12, "end")
    low = 52 + shape.kv_heads * 21 + 22
    drawing.key(0, low, [("text", "K and V of text", 150), ("visual", "K and V of visual tokens", 210),
                         ("none", "nothing kept", 120)])  # fmt: skip
    return "K and V kept for each layer and KV head, dense and under a plan"


def deep_front(drawing: Drawing) -> str:
    """Scores over visual FLOPs on the deep model, kind by kind."""
    answers = Answers.load(ANSWERS)
    for index, kind in enumerate(("place", "count", "reading", "later")):
        _scores(drawing, answers, kind, 44 + index % 2 * 400, 34 + index // 2 * 236, 330, 170)
    drawing.text(44, 502, "right over visual FLOPs, shares of dense", "quiet", 13)
    drawing.key(324, 502, [(color, words, room) for color, (words, room) in KINDS_OF_PLANS.items()])
    return "Scores of plans over their visual FLOPs on the deep model, four kinds of questions"


# In the deep model's front, by colour; a legend's words and room.
KINDS_OF_PLANS = {
    "scores": ("published", 90), "visual": ("others", 70), "projections": ("fitted", 66), "text": ("trained", 76),
    "quiet": ("blind", 60),
}  # fmt: skip


def _color(name: str) -> str:
    """Of a plan by its name in the answers: `NAME`, `NAME, fitted` or `NAME, trained`."""
    for ending, color in ((", trained", "text"), (", fitted", "projections")):
        if name.endswith(ending):
            return color
    method = re.sub(r"\+\d+$", "", name)  # with first layers whole
    return "scores" if method in {*plan_names()} - {DENSE, "auto"} else "visual"


def _scores(drawing, answers: Answers, kind: str, x: float, y: float, wide: float, tall: float) -> None:
    drawing.text(x, y - 14, kind, bold=True)
    for share in (0, 0.25, 0.5, 0.75, 1):
        drawing.lines([[(x, y + tall * share), (x + wide, y + tall * share)]], "none")
        drawing.text(x - 8, y + tall * (1 - share) + 4, f"{share:.0%}", "quiet", 12, "end")
        drawing.text(x + wide * share, y + tall + 30, f"{share:.0%}", "quiet", 12, "middle")
    blind = y + tall * (1 - answers.of(BLIND, kind).mean())
    drawing.lines([[(x, blind), (x + wide, blind)]], "quiet")
    dots = {
        name: (x + wide * answers.visual_flops[name], y + tall * (1 - answers.of(name, kind).mean()))
        for name in sorted({*answers.right} - {BLIND}, key=lambda name: (_color(name) != "scores", name))
    }
    taken = [(left - 4, left + 4, top + 4) for left, top in dots.values()]
    for name, (left, top) in dots.items():
        drawing.rect(left - 3.5, top - 3.5, 7, 7, _color(name))
        if _color(name) == "scores":
            drawing.text(left + 7, free_height(taken, left + 7, top - 6, 6.2 * len(name)), name, "scores", 11)


FIGURES = {
    plans: (800, 512), attention: (770, 228), layout: (630, 256), lanes: (826, 346), cache: (730, 250),
    deep_front: (786, 506),
}  # fmt: skip


def drawn(figure: Callable[[Drawing], str]) -> str:
    """One of FIGURES as SVG."""
    drawing = Drawing(*FIGURES[figure])
    label = figure(drawing)
    return drawing.svg(label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/assets"), metavar="FOLDER")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:
        (out / f"{figure.__name__}.svg").write_text(drawn(figure), encoding="utf-8")


if __name__ == "__main__":
    main()
