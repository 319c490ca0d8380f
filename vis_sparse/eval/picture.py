"""The demo's picture: example questions with their answers, and what each layer computes for the visual tokens."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .layer_work import of_thumbnail, outline, runs_in_words
from .numbers import percent

INK, QUIET, ACCENT, MARK, BACK, LINE = "#1d2126", "#666d75", "#0a7c72", "#d9480f", "#b9c4cc", "#d5d1c8"
PIXELS = 32  # drawn for a visual token, a side
LEGEND = (
    "A square is a visual token{}, its area the share of the dense layer's work done for it. "
    "The line encloses what the marked token attends to. Dashed: nothing is computed."
)


def picture(results: dict, file: Path) -> None:
    """Draw the demo's figures and write them to `file` (PNG)."""
    plans, examples, layers = results["plans"], results["examples"], results["model"]["layers"]
    wide, example_tall, plan_tall = 1.45 * layers + 0.6, 2.1, 1.95
    figure = Figure(figsize=(wide, example_tall + plan_tall * len(plans) + 0.4), dpi=150, facecolor="white")
    above, below = figure.subfigures(2, 1, height_ratios=(example_tall, plan_tall * len(plans) + 0.4))
    side = 0.3 / wide
    for axes, example in zip(above.subplots(1, len(examples)), examples, strict=True):
        _draw_example(axes, example)
    above.subplots_adjust(left=side, right=1 - 1.5 / wide, top=0.8, bottom=0.08, wspace=1.1)
    image = decoded(results["model"]["image_png"])
    for axes_row, plan in zip(below.subplots(len(plans), layers), plans, strict=True):
        for index, (axes, layer) in enumerate(zip(axes_row, plan["layers"], strict=True)):
            _draw_layer(axes, layer, image, results["model"]["grid"])
            axes.set_xlabel(f"layer {index}: {layer['share']:.0%}", fontsize=8, color=QUIET, labelpad=4)
        _label(axes_row[0], plan, plans[0], results["questions"])
    below.subplots_adjust(left=side, right=1 - side, top=0.885, bottom=0.035, wspace=0.08, hspace=0.42)
    below.text(side, 0.96, LEGEND.format(of_thumbnail(results["model"])), fontsize=8.5, color=QUIET)
    figure.savefig(file)


def decoded(png: str) -> np.ndarray:
    """A base64 PNG as (height, width, 3) floats in 0..1."""
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(png)))[..., :3]


def _draw_example(axes, example: dict) -> None:
    image = decoded(example["image_png"])
    axes.imshow(image)
    side = max(image.shape[:2]) - 0.5
    axes.set(xlim=(-0.5, side), ylim=(side, -0.5))  # the same room for the words whatever the image's shape
    _frame(axes, LINE)
    axes.set_title(example["question"], fontsize=9, color=INK, loc="left", pad=7)
    for index, (plan, words) in enumerate(example["given"].items()):
        right = words == example["answer"]
        place = {"xycoords": "axes fraction", "fontsize": 8.5, "va": "top", "annotation_clip": False}
        height = 0.98 - 0.2 * index
        axes.annotate(plan, (1.08, height), color=QUIET, **place)
        axes.annotate(f"{words} {'✓' if right else '✗'}", (1.56, height), color=INK if right else MARK, **place)


def _draw_layer(axes, layer: dict, image: np.ndarray, grid: list[int]) -> None:
    height, width = grid
    axes.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -0.1), aspect="equal")
    if layer["share"] == 0:
        _frame(axes, LINE, "dashed")
        return
    axes.imshow(halftone(image, layer["share"], height, width), extent=(0, width, height, 0), interpolation="nearest")
    axes.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -0.1))
    _frame(axes, None)
    if layer["seen"]:
        edges = [((x0, y0), (x1, y1)) for x0, y0, x1, y1 in outline(layer["seen"], width)]
        axes.add_collection(LineCollection(edges, colors=MARK, linewidths=1.4, capstyle="projecting"))
        axes.add_patch(Rectangle((width // 2, height // 2), 1, 1, facecolor=MARK))


def halftone(image: np.ndarray, share: float, height: int, width: int) -> np.ndarray:
    """`image` seen through one square a visual token, `share` of the token's area: (height, width, 3) x PIXELS."""
    rows, columns = (
        np.arange(side * PIXELS) * size // (side * PIXELS)
        for side, size in zip((height, width), image.shape[:2], strict=True)
    )
    distance = np.abs((np.arange(PIXELS) + 0.5) / PIXELS - 0.5) * 2
    inside = distance <= np.sqrt(share)
    open_ = np.tile(inside[:, None] & inside[None, :], (height, width))
    back = np.array([int(BACK[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(open_[..., None], image[rows][:, columns], back)


def _label(axes, plan: dict, dense: dict, questions: dict[str, int]) -> None:
    right = sum(plan["accuracy"][kind] * count for kind, count in questions.items()) / sum(questions.values())
    words = (
        f"{plan['flops_visual'] / dense['flops_visual']:.0%} of the visual FLOPs, "
        f"{plan['kv_bytes'] / dense['kv_bytes']:.0%} of the KV cache, {percent(right)} % of answers right.   "
        f"Layers {runs_in_words(plan['layers'])}"
    )
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(plan["plan"], (0, 1), xytext=(0, 6), fontsize=10, fontweight="bold", color=INK, **place)
    axes.annotate(words, (0, 1), xytext=(58, 6), fontsize=8.5, color=QUIET, **place)


def _frame(axes, color: str | None, style: str = "solid") -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=color is not None, edgecolor=color, linestyle=style)
