"""FLOPs of a vision encoder, unpatched or under the tower section of a plan, from its shape and its images' grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..executor.tokens import choose, left_by_layer
from ..layout.layout import VisualLayout
from ..layout.packing import Coordinates, visual_coordinates
from ..plans.layer_plan import Neighborhood, TokenBudget
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork, tower_schedule
from .pairs import left_pairs
from .report import LaneCost, LayerCost
from .shapes import VisionShape

Grids = Sequence[tuple[int, int]]


def patch_embedding(shape: VisionShape, grids: Grids) -> int:
    """FLOPs before the first layer. grids: (height, width) in patches of each image or frame."""
    return 2 * sum(height * width for height, width in grids) * shape.patch_values * shape.hidden


def tower_layers(
    shape: VisionShape, plan: VisualPlan | None, grids: Grids, duplicates: float = 0.0, scored: bool = False
) -> tuple[LayerCost, ...]:
    """FLOPs of every layer: of patches (the visual lane) and of class tokens (the text lane), by part.

    plan: of the encoder's layers, heads resolved; None: the unpatched encoder, which runs the layers that nobody reads
    too. duplicates: the share of each image's patches that leaves before the first layer; evenly spaced ones stand in.
    scored: whether the attention that patches receive in the last layer that runs is counted, which is formed once
    more.
    """
    used = shape.layers if plan is None else shape.layers_read
    plan = VisualPlan.dense(shape.layers) if plan is None else plan
    work = tower_schedule(plan, shape.heads, shape.ffn, shape.class_token)
    layout = VisualLayout.from_grids([[(0, (1, *grid))] for grid in grids])
    costs, patches, coming = [], None, visual_coordinates(layout)
    if duplicates:
        coming = coming.take(choose(TokenBudget(1 - duplicates, "uniform"), 0, coming, None))
    budgets = (None if item is None else item.tokens for item in work)
    scored_at = max((index for index, item in enumerate(work[:used]) if item is not None), default=-1) if scored else -1
    for index, (item, left) in enumerate(zip(work, left_by_layer(budgets, coming))):
        if item is None or index >= used:
            costs.append(LayerCost(LaneCost()))
            continue
        patches = patches if patches is not None and patches.left is left else _Patches(shape, layout, left)
        cost = _layer(shape, item, patches, shape.is_windowed(index))
        if index == scored_at:
            cost = replace(cost, visual=_scored(shape, item, patches.sizes(shape.is_windowed(index)), cost.visual))
        costs.append(cost)
    return tuple(costs)


def _scored(shape: VisionShape, work: LayerWork, sizes: np.ndarray, cost: LaneCost) -> LaneCost:
    """A layer's cost with the attention that its patches receive: of class tokens or of all patches, in all heads."""
    each = int(shape.class_token)
    rows, queries = int(sizes.sum()) + each * len(sizes), each or sizes
    is_whole = work.attention == "full" and len(work.query_heads) == shape.heads
    qkv = 0 if is_whole else 6 * rows * shape.hidden**2  # all heads' queries and keys are there already, or made anew
    scores = 2 * shape.hidden * int((queries * (sizes + each)).sum())
    return replace(cost, qkv=cost.qkv + qkv, scores=cost.scores + scores)


def tower_flops(shape: VisionShape, plan: VisualPlan | None, grids: Grids) -> int:
    """FLOPs of the whole encoder."""
    return patch_embedding(shape, grids) + sum(layer.total for layer in tower_layers(shape, plan, grids))


class _Patches:
    """The patches that come into a layer."""

    def __init__(self, shape: VisionShape, layout: VisualLayout, left: Coordinates):
        self.left, self._layouts = left, {False: (layout, left)}
        if shape.window:
            self._layouts[True] = _in_windows(layout, left, shape.window)

    def sizes(self, windowed: bool) -> np.ndarray:
        """Patches of each image, or of each window."""
        layout, tokens = self._layouts[windowed]
        return np.bincount(tokens.segment, minlength=len(layout.segments))

    def near(self, near: Neighborhood, windowed: bool) -> int:
        """Pairs that a neighbourhood reads."""
        return left_pairs(near, *self._layouts[windowed])


def _in_windows(layout: VisualLayout, left: Coordinates, side: int) -> tuple[VisualLayout, Coordinates]:
    """The model's own windows as segments, and the patches by place in them."""
    grids, first = [], {}
    for index, segment in enumerate(layout.segments):
        for y in range(0, segment.height, side):
            for x in range(0, segment.width, side):
                first[index, y // side, x // side] = len(grids)
                grids.append((1, min(side, segment.height - y), min(side, segment.width - x)))
    windows = VisualLayout.from_grids([[(0, grid)] for grid in grids])
    places = zip(left.segment.tolist(), (left.y // side).tolist(), (left.x // side).tolist())
    window = np.array([first[place] for place in places], dtype=np.int64)
    return windows, left._replace(segment=window, y=left.y % side, x=left.x % side)


def _layer(shape: VisionShape, work: LayerWork, patches: _Patches, windowed: bool) -> LayerCost:
    sizes, width, each = patches.sizes(windowed), shape.hidden // shape.heads, int(shape.class_token)
    rows, globals_ = int(sizes.sum()), each * len(sizes)
    queries, keys = len(work.query_heads), len(work.key_heads)
    # norms over all heads need the queries and keys of all
    whole = shape.heads if shape.whole_norms else 0
    projected = (queries and max(queries, whole)) + (keys and max(keys, whole)) + keys
    if isinstance(work.attention, Neighborhood):
        pairs = patches.near(work.attention, windowed) + rows * each if queries else 0
    else:
        pairs = int((sizes * (sizes + each)).sum())
    neurons = work.neurons if isinstance(work.neurons, int) else len(work.neurons)
    ffn = 2 * (3 if shape.gated else 2) * shape.hidden
    visual = LaneCost(
        qkv=2 * rows * shape.hidden * width * projected,
        scores=4 * width * queries * pairs,
        out=2 * rows * shape.hidden * width * queries,
        ffn=ffn * rows * neurons,
    )
    active = len(work.value_heads)
    read = int((each * (sizes + each)).sum()) * active + globals_ * each * (shape.heads - active)
    of_globals = LaneCost(
        qkv=6 * globals_ * shape.hidden**2,
        scores=4 * width * read,
        out=2 * globals_ * shape.hidden**2,
        ffn=ffn * globals_ * shape.ffn,
    )
    return LayerCost(visual, of_globals)
