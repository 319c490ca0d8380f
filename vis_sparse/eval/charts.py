"""Pictures for HTML pages, as inline SVG that takes its colours from the page (classes and variables of page.css)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH = 420
LEFT, RIGHT, TOP, BOTTOM = 44, 84, 12, 34
_LABEL = 13  # height of a line of text


def scatter(points: Sequence[tuple[str, float, float, float]], best: Sequence[str], across: str, up: str) -> str:
    """Points (label, x, y, error of y) with labels; a line joins those named in `best`. x starts at 0.

    across, up: what the axes are, with units.
    """
    tall = 240 + 8 * max(0, len(points) - 6)  # room for the labels
    highest = max(x for _, x, _, _ in points)
    low, high = (side(y + sign * error for _, _, y, error in points) for side, sign in ((min, -1), (max, 1)))
    margin = 0.06 * (high - low) or 0.01
    x_ticks = ticks(0, highest)
    y_ticks = [tick for tick in ticks(low - margin, high + margin) if tick <= high]  # a score of 1 is the highest
    low, high = min(low - margin, y_ticks[0]), max(high + margin, y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / max(highest, x_ticks[-1]),
            TOP + (tall - TOP - BOTTOM) * (high - y) / (high - low),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(0, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, low)
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{tall - BOTTOM + 15}">{tick:g}</text>')
    parts.append(f'<text class="tick middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{tall - 4}">{escape(across)}</text>')
    line = [place(x, y) for label, x, y, _ in sorted(points, key=lambda p: p[1]) if label in best]
    parts.append('<path class="front" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in line) + '"/>')
    dots = [place(x, y) for _, x, y, _ in points]
    taken = [(x - 4, x + 4, y + 4) for x, y in dots]
    for label, x, y, error in sorted(points, key=lambda p: -p[2]):
        at_x, at_y = place(x, y)
        half = abs(place(0, y + error)[1] - at_y)
        kind = "best" if label in best else "rest"
        parts.append(f'<path class="{kind}" d="M{at_x:.1f} {at_y - half:.1f}V{at_y + half:.1f}"/>')
        parts.append(f'<circle class="{kind}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="3.5"/>')
        text_y = free_height(taken, at_x + 7, at_y + 4, 6.2 * len(label))
        parts.append(f'<text x="{at_x + 7:.1f}" y="{text_y:.1f}">{escape(label)}</text>')
    name = escape(f"{up} over {across}: " + ", ".join(f"{label} {y:g} at {x:g}" for label, x, y, _ in points))
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {tall}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def free_height(taken: list, x: float, y: float, width: float) -> float:
    """The height nearest to y, downwards, at which a label of `width` at x covers no other; noted in `taken`."""
    while any(abs(y - other_y) < _LABEL and x < end and start < x + width for start, end, other_y in taken):
        y += 1
    taken.append((x, x + width, y))
    return y


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within low..high."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    for factor in (1, 2, 5, 10):
        first, last = math.ceil(low / (factor * step) - 1e-9), math.floor(high / (factor * step) + 1e-9)
        if last - first < 6:
            return [round(i * factor * step, 12) for i in range(first, last + 1)]
    raise AssertionError("ten steps of the first size are more than the range")


def heat_map(values: Sequence[Sequence[float]], across: str, up: str) -> str:
    """A matrix as squares, from the page's card colour (least) to its accent (most), on a log scale."""
    rows, columns = len(values), len(values[0])
    logs = [[math.log(max(value, 1e-6)) for value in row] for row in values]
    low, high = min(map(min, logs)), max(map(max, logs))
    squares = "".join(
        f'<rect x="{x}" y="{y}" width=".94" height=".94" '
        f'style="--share:{100 * (value - low) / (high - low or 1):.0f}%">'
        f"<title>{up} {y}, {across} {x}: {values[y][x]:.3g}</title></rect>"
        for y, row in enumerate(logs)
        for x, value in enumerate(row)
    )
    name = f"{rows} {up}s by {columns} {across}s"
    return (
        f'<svg class="heat" viewBox="0 0 {columns} {rows}" style="max-width:{max(12, columns * 1.4):.0f}em" role="img" '
        f'aria-label="{name}">{squares}</svg>'
    )


def strip(shares: Sequence[float], reads: Sequence[bool]) -> str:
    """A plan at a glance: a bar a layer, its height the share of the dense layer's visual work; a dot where text reads
    visual tokens."""
    bars = "".join(
        f'<rect class="back" x="{x}" y="0" width=".8" height="4"/>'
        f'<rect x="{x}" y="{4 - 4 * share:.3f}" width=".8" height="{4 * share:.3f}">'
        f"<title>layer {x}: {share:.0%}</title></rect>" + (f'<circle cx="{x + 0.4}" cy="4.6" r=".25"/>' if read else "")
        for x, (share, read) in enumerate(zip(shares, reads, strict=True))
    )
    words = "work of the visual tokens by layer: " + ", ".join(f"{share:.0%}" for share in shares)
    return (
        f'<svg class="strip" viewBox="0 0 {len(shares)} 5" preserveAspectRatio="none" role="img" '
        f'aria-label="{words}">{bars}</svg>'
    )
