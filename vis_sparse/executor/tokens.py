"""Which visual tokens come into the decoder, and which go on to the next layer: chosen on the host, from coordinates
and from one score a token."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..layout.layout import LayoutError
from ..layout.packing import Coordinates, Packing
from ..plans.before import TokensBefore
from ..plans.layer_plan import TokenBudget


def choose(
    budget: TokenBudget | TokensBefore, layer: int, visual: Coordinates, scores: np.ndarray | None
) -> np.ndarray:
    """The packed rows that stay, ascending.

    layer: index in the decoder. visual: coordinates of the rows, sample after sample. scores: (rows,), the higher the
    sooner a row stays, for the orders that have them ("attention", "norm"); without them evenly spaced rows stand in,
    as many: good for counting.
    """
    if budget.by == "stride":
        return np.flatnonzero(_on_sub_grid(budget, visual))
    kept = [np.zeros(0, dtype=np.int64)]
    for sample in np.unique(visual.sample):
        rows = np.flatnonzero(visual.sample == sample)
        count = budget.count(len(rows))
        if budget.by == "random":
            first = np.sort(np.random.default_rng(layer).permutation(len(rows))[:count])
        else:
            first = first_ones(count, len(rows), None if scores is None or budget.by == "uniform" else scores[rows])
        kept.append(rows[first])
    return np.concatenate(kept)


def first_ones(count: int, of: int, scores: np.ndarray | None) -> np.ndarray:
    """`count` of `of` rows, ascending: those of the highest scores, of equal ones the first; evenly spaced without."""
    if scores is None:
        return (2 * np.arange(count) + 1) * of // (2 * max(count, 1))
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _on_sub_grid(budget: TokenBudget | TokensBefore, visual: Coordinates) -> np.ndarray:
    inside = np.zeros(len(visual.sample), dtype=bool)
    for height, width in sorted(set(zip(visual.height.tolist(), visual.width.tolist()))):
        down, across = _steps(height, width, budget.keep)
        lies = (visual.y % down == (down - 1) // 2) & (visual.x % across == (across - 1) // 2)
        inside |= lies & (visual.height == height) & (visual.width == width)
    return inside


def _steps(height: int, width: int, keep: float) -> tuple[int, int]:
    """Steps down and across whose share is closest to `keep`; of equal ones the most alike, then the least down."""

    def kept(step: int, side: int) -> int:
        return len(range((step - 1) // 2, side, step))

    def rank(steps: tuple[int, int]):
        down, across = steps
        return abs(kept(down, height) * kept(across, width) - keep * height * width), abs(down - across), down

    return min(((down, across) for down in range(1, height + 1) for across in range(1, width + 1)), key=rank)


def entering(
    before: TokensBefore, visual: Coordinates, scores: np.ndarray | None = None, duplicates: float = 0.0
) -> np.ndarray:
    """The packed rows that come into the decoder, ascending.

    visual: coordinates of the rows. scores: (rows,), the higher the sooner a row stays; by duplicate above 0 for those
    that do. Without them evenly spaced rows stand in, as many: good for counting. duplicates: by duplicate, the share
    of the rows that is taken to leave then.
    """
    if before.by == "change":
        return _changed(before, visual, scores)
    if before.by == "duplicate" and scores is not None:
        return np.flatnonzero(scores > 0)
    budget = before if before.keep is not None else TokenBudget(max(1 - duplicates, 1e-9), "uniform")
    return choose(budget, 0, visual._replace(sample=visual.segment), scores)


def _changed(before: TokensBefore, visual: Coordinates, scores: np.ndarray | None) -> np.ndarray:
    stays = visual.frame == 0
    for segment in np.unique(visual.segment[~stays]):
        rows = np.flatnonzero(visual.segment == segment)
        later = rows[~stays[rows]]
        more = max(before.count(len(rows)) - (len(rows) - len(later)), 0)
        stays[later[first_ones(more, len(later), None if scores is None else scores[later])]] = True
    return np.flatnonzero(stays)


def left_by_layer(budgets: Iterable[TokenBudget | None], left: Coordinates) -> list[Coordinates]:
    """Of the visual tokens `left` before the first layer, those that come into each layer, for counting: their number
    is exact; where scores choose, which ones they are is not known without a model, and evenly spaced ones stand in."""
    layers = []
    for layer, budget in enumerate(budgets):
        layers.append(left)
        if budget is not None:
            left = left.take(choose(budget, layer, left, None))
    return layers


def ranking_rows(packing: Packing, prompt_ends: np.ndarray) -> np.ndarray | None:
    """(batch,) the text row that ranks each sample's visual tokens: the last one of the prompt; None if that is the
    call's last row in all samples.

    prompt_ends: (batch,) columns of the sequence behind the prompts; what a call holds beyond is an answer or a draft,
    on which no choice may depend. Samples without text of the prompt in the call count on their last row.
    """
    columns = packing.text_columns + packing.past
    asked = packing.text_valid & (columns < prompt_ends[:, None])
    last = columns.shape[1] - 1
    rows = np.where(asked.any(1), last - asked[:, ::-1].argmax(1), last)
    return None if (rows == last).all() else rows


def check_text_follows(packing: Packing, ranks: np.ndarray | None = None) -> None:
    """Raise LayoutError where a visual token of the call has no text after it (of the prompt, if `ranks` says where it
    ends), and so nothing to score it."""
    if not packing.num_visual:
        return
    last = np.where(packing.text_valid, packing.text_columns, -1).max(1, initial=-1)
    if ranks is not None:
        last = packing.text_columns[np.arange(packing.batch), ranks]
    late = packing.visual.column - packing.past > last[packing.visual.sample]
    if late.any():
        sample, column = packing.visual.sample[late][0], packing.visual.column[late][0]
        raise LayoutError(
            f"tokens: got a call with the visual token at position {column} of sample {sample} and no text after it, "
            "expected text of the prompt after the images of every call (by attention, its last row chooses)"
        )
