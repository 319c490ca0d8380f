"""The layers x heads heat map in a terminal."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.text import Text

# dark to bright, evenly spaced in lightness
_COLOURS = ("#1b1044", "#4a1079", "#82206c", "#b93556", "#e8602d", "#fba40a", "#f6e763")


def draw_heads(console: Console, heads: np.ndarray, title: str) -> None:
    """Head scores (layers, heads), a layer a line, two characters a head; log scale.

    Terminals without colours get shades of blocks.
    """
    low, high = (np.log10(max(float(bound), 1e-6)) for bound in (heads.min(), heads.max()))
    console.print(Text(f"head scores ({title}) by layer and head", style="bold"))
    for index, row in enumerate(heads):
        line = Text(f"{index:>4} ", style="bright_black")
        for score in row:
            level = (np.log10(max(float(score), 1e-6)) - low) / max(high - low, 1e-6)
            line.append(_cell(console, min(max(level, 0.0), 1.0)))
        console.print(line, no_wrap=True, crop=True)
    legend = Text(f"     {10**low:.2g} ", style="bright_black")
    for step in range(7):
        legend.append(_cell(console, step / 6))
    console.print(legend + Text(f" {10**high:.2g}", style="bright_black"))


def _cell(console: Console, level: float) -> Text:
    if console.color_system is None:
        return Text("·░▒▓█"[round(level * 4)] * 2)
    return Text("██", style=_COLOURS[round(level * (len(_COLOURS) - 1))])
