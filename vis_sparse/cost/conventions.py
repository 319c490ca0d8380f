"""The ways of counting a plan's FLOPs that are in use. Each takes (shape, plan, layout, text tokens of a sample, the
visual tokens that come into the decoder), with head budgets resolved, and gives the decoder's cost in prefill and in
one decode step (None where it has none).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from ..executor.tokens import left_by_layer
from ..layout.layout import VisualLayout
from ..layout.packing import Coordinates
from ..plans.layer_plan import Neighborhood, TokenBudget
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork, schedule
from .pairs import LanePairs, lane_pairs, left_pairs, near_pairs
from .report import LaneCost, LayerCost, PassCost
from .shapes import ModelShape

_GATED_FFN = 3  # matrices of a gated FFN: gate, up, down


class VisualTokens:
    """The visual tokens that come into a layer, and the pairs that attention reads among them and the text."""

    def __init__(self, layout: VisualLayout, text_tokens: int, left: Coordinates):
        self._layout, self._text_tokens, self._left = layout, text_tokens, left
        self.rows = len(left.sample)
        self._near: dict[Neighborhood, int] = {}

    @cached_property
    def lanes(self) -> LanePairs:
        sizes = np.bincount(self._left.segment, minlength=len(self._layout.segments)).tolist()
        return lane_pairs(self._layout, self._text_tokens, sizes)

    @cached_property
    def by_sample(self) -> list[int]:
        return np.bincount(self._left.sample, minlength=self._layout.batch_size).tolist()

    def near(self, attention: Neighborhood) -> int:
        """Pairs that a neighbourhood reads among what is left."""
        if attention not in self._near:
            whole = self.rows == self._layout.num_visual
            pairs = near_pairs(attention, self._layout) if whole else left_pairs(attention, self._layout, self._left)
            self._near[attention] = pairs
        return self._near[attention]


def tokens_by_layer(
    budgets: Iterable[TokenBudget | None], layout: VisualLayout, text_tokens: int, coming: Coordinates
) -> list[VisualTokens]:
    """The visual tokens of every layer; layers between which none leaves share them. coming: into the first one."""
    layers: list[VisualTokens] = []
    before = None
    for left in left_by_layer(budgets, coming):
        layers.append(layers[-1] if left is before else VisualTokens(layout, text_tokens, left))
        before = left
    return layers


def executed(
    shape: ModelShape, plan: VisualPlan, layout: VisualLayout, text_tokens: int, coming: Coordinates
) -> tuple[PassCost, PassCost]:
    """Prefill and one decode step as the patched model runs them, decoder only. Head budgets must be resolved."""
    work = schedule(plan, shape.heads, shape.kv_heads, shape.ffn)
    tokens = tokens_by_layer((item.tokens for item in work), layout, text_tokens, coming)
    samples = layout.batch_size
    keys = samples * (text_tokens + 1)  # text keys that the rows of a decode step read
    zero = plan.semantics == "zero"
    prefill, decode = [], []
    for item, left in zip(work, tokens, strict=True):
        pairs = left.lanes
        visual = _visual_lane(shape, item, left)
        text = _text_lane(shape, item, samples * text_tokens, pairs.text_text, pairs.text_visual, zero)
        if item.tokens is not None and item.tokens.by == "attention":
            text = dataclasses.replace(text, scores=text.scores + _choice(shape, item, left, text_tokens))
        prefill.append(LayerCost(visual, text))
        decode.append(LayerCost(LaneCost(), _text_lane(shape, item, samples, keys, left.rows, zero)))
    return PassCost(tuple(prefill)), PassCost(tuple(decode))


def _choice(shape: ModelShape, work: LayerWork, left: VisualTokens, text_tokens: int) -> int:
    """The last text row of each sample with images against every key it reads, once more, for the tokens' scores."""
    keys = sum(text_tokens + count for count in left.by_sample if count)
    return 2 * shape.head_dim * len(work.value_heads) * keys


def _visual_lane(shape: ModelShape, work: LayerWork, left: VisualTokens) -> LaneCost:
    queries, pairs = len(work.query_heads), left.lanes
    scores = 0
    if queries:
        near = isinstance(work.attention, Neighborhood)
        own = left.near(work.attention) if near else pairs.visual_causal
        # in heads whose weights on visual values are zeroed, only the product with the keys is run for them
        valued = len(set(work.query_heads) & set(work.value_heads))
        scores = 2 * shape.head_dim * (queries * (own + 2 * pairs.visual_text) + valued * own)
    per_head = 2 * left.rows * shape.hidden * shape.head_dim
    return LaneCost(
        qkv=per_head * (queries + 2 * len(work.key_heads)),
        scores=scores,
        out=per_head * queries,
        ffn=2 * _GATED_FFN * left.rows * shape.hidden * _count(work.neurons),
    )


def _text_lane(
    shape: ModelShape, work: LayerWork, rows: int, text_pairs: int, visual_pairs: int, zero: bool
) -> LaneCost:
    pairs = 2 * text_pairs * shape.heads
    if work.reads:
        valued = len(work.value_heads)
        pairs += visual_pairs * ((shape.heads if zero else valued) + valued)
    per_head = 2 * rows * shape.hidden * shape.head_dim
    return LaneCost(
        qkv=per_head * (shape.heads + 2 * shape.kv_heads),
        scores=2 * shape.head_dim * pairs,
        out=per_head * shape.heads,
        ffn=2 * _GATED_FFN * rows * shape.hidden * shape.ffn,
    )


def paper(
    shape: ModelShape, plan: VisualPlan, layout: VisualLayout, text_tokens: int, coming: Coordinates
) -> tuple[PassCost, None]:
    """FLOPs of the visual tokens, 2(4nd^2 + 2n^2 d + 3ndm) a layer scaled by the plan (arXiv 2410.06169).

    Projections and scores by the share of active heads, n keys of a query replaced by the mean size of its
    neighbourhood, the FFN by its share of neurons; a layer whose rows do not attend but are read pays for K and V only
    (4nd^2). n is the number of tokens that are left in a layer; to choose them costs nothing. Layers after the last in
    which text reads visual tokens are free, whatever the plan's semantics. Grouped KV heads are ignored: the formula is
    that of MHA at the model's width.
    """
    return _nominal(shape, plan, layout, text_tokens, coming, per_mac=2, ffn_matrices=3), None


def macs(
    shape: ModelShape, plan: VisualPlan, layout: VisualLayout, text_tokens: int, coming: Coordinates
) -> tuple[PassCost, None]:
    """Multiply-adds of the visual tokens: half of `paper`."""
    return _nominal(shape, plan, layout, text_tokens, coming, per_mac=1, ffn_matrices=3), None


def fastv(
    shape: ModelShape, plan: VisualPlan, layout: VisualLayout, text_tokens: int, coming: Coordinates
) -> tuple[PassCost, None]:
    """Multiply-adds of the visual tokens as FastV writes them, 4nd^2 + 2n^2 d + 2ndm: two FFN matrices, not three."""
    return _nominal(shape, plan, layout, text_tokens, coming, per_mac=1, ffn_matrices=2), None


def _nominal(
    shape: ModelShape,
    plan: VisualPlan,
    layout: VisualLayout,
    text_tokens: int,
    coming: Coordinates,
    per_mac: int,
    ffn_matrices: int,
) -> PassCost:
    active = [shape.heads if layer.heads is None else sum(layer.heads) for layer in plan.layers]
    last_read = max((i for i, layer in enumerate(plan.layers) if layer.text_reads and active[i]), default=-1)
    tokens = tokens_by_layer((layer.tokens for layer in plan.layers), layout, text_tokens, coming)
    layers = []
    for index, (layer, left) in enumerate(zip(plan.layers, tokens, strict=True)):
        if index > last_read:
            layers.append(LayerCost(LaneCost()))
            continue
        row_width = per_mac * left.rows * shape.hidden  # one row of every token against one column of weights
        attends = layer.attention != "none"
        width = round(shape.hidden * active[index] / shape.heads)
        projections = 3 if attends else 2 if layer.text_reads else 0
        visual = LaneCost(
            qkv=row_width * projections * width,
            scores=per_mac * 2 * _nominal_pairs(layer.attention, left) * width,
            out=row_width * width if attends else 0,
            ffn=row_width * ffn_matrices * _count(layer.neurons(shape.ffn)),
        )
        layers.append(LayerCost(visual))
    return PassCost(tuple(layers))


def _nominal_pairs(attention: str | Neighborhood, left: VisualTokens) -> int:
    if attention == "none":
        return 0
    if isinstance(attention, Neighborhood):
        return left.near(attention)
    return sum(count * count for count in left.by_sample)


def _count(neurons: int | tuple[int, ...]) -> int:
    return neurons if isinstance(neurons, int) else len(neurons)
