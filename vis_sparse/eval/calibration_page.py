"""Pictures of a calibration and of a search's front: PNG files, and one self-contained HTML page with them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from ..calibration.probe import SENSITIVITY
from ..calibration.records import SampleError
from ..plans.atomic_write import written
from ..plans.scores import Calibration
from ..searching.pareto import pareto
from ..searching.search import Point

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 3rem auto; padding: 0 1.5rem;
       background: #faf9f6; color: #1d2126; }
h1 { font-size: 1.9rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; border: 1px solid #e2dfd8; border-radius: 8px; }
figcaption, dt { color: #5c636b; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""
_COLOURS = ("#0a7c72", "#d9480f", "#5b3fa6")


def write_report(file: Path, calibration: Calibration, front: Sequence[Point] = (), cost: str = "visual") -> list[Path]:
    """Write the page `file` (.html) and its pictures beside it as `<name>-<picture>.png`; returns the pictures' files.

    front: points of a search, for a picture of KL against `cost`. Raises SampleError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: F401
    except ImportError:
        raise SampleError("report: pictures need matplotlib (pip install matplotlib)") from None
    scores = calibration.metadata["scores"]
    pictures = [
        ("heads", f"Head scores ({scores}) of every layer and head, log scale.", _heads(calibration)),
        ("layers", "What layers do with visual tokens.", _layers(calibration)),
    ]
    if front:
        pictures.append(("front", f"Measured KL to the dense model against cost ({cost}).", _front(front, cost)))
    files, figures = [], []
    for name, caption, figure in pictures:
        files.append(file.with_name(f"{file.stem}-{name}.png"))
        figure.savefig(written(files[-1]), dpi=150, facecolor="white")
        image = base64.b64encode(files[-1].read_bytes()).decode()
        figures.append(
            f'<h2>{name.capitalize()}</h2><figure><img alt="{escape(caption)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    facts = {"samples": str(calibration.num_samples), **calibration.metadata}
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in sorted(facts.items()) if value)
    file.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>vis_sparse calibration</title>'
        f"<style>{_STYLE}</style><h1>What the visual tokens of {escape(calibration.metadata['model'])} need</h1>"
        f"{''.join(figures)}<h2>Run</h2><dl>{rows}</dl></html>\n",
        encoding="utf-8",
    )
    return files


def _heads(calibration: Calibration):
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    scores = np.maximum(calibration.heads, 1e-6)
    layers, heads = scores.shape
    figure = Figure(figsize=(min(3 + heads / 4, 14), min(2 + layers / 4, 12)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scores, norm=LogNorm(scores.min(), scores.max() * (1 + 1e-6)), cmap="inferno", aspect="auto")
    axes.set(xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=axes)
    return figure


def _layers(calibration: Calibration):
    from matplotlib.figure import Figure

    panels = [
        ("attention of later text on visual tokens", {"share": calibration.text_mass}),
        (
            "relative norm of what a part adds to visual rows",
            {"attention": calibration.attention_change[:, 1], "FFN": calibration.ffn_change[:, 1]},
        ),
    ]
    if calibration.sensitivity is not None:
        lines = dict(zip(SENSITIVITY, calibration.sensitivity.T, strict=True))
        panels.append(("KL of the answers with one layer reduced (nats)", lines))
    figure = Figure(figsize=(8, 2.4 * len(panels)), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels):
        for (name, values), colour in zip(lines.items(), _COLOURS):
            axes.plot(values, marker="o", markersize=3, color=colour, label=name)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    return figure


def _front(points: Sequence[Point], cost: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, front = figure.subplots(), pareto(points)
    axes.plot([p.cost for p in points], [p.kl for p in points], ".", color="#b9c4cc", label="steps")
    axes.step([p.cost for p in front], [p.kl for p in front], where="post", color=_COLOURS[0], label="front")
    axes.set(xlabel=f"share of the dense model's cost ({cost})", ylabel="KL to dense (nats)")
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
