"""The ways of counting a plan's FLOPs that are in use. Each takes (shape, plan, layout, text tokens of a sample), with
head budgets resolved, and gives the decoder's cost in prefill and in one decode step (None where it has none).
"""

from __future__ import annotations

from .cost_report import LaneCost, LayerCost, PassCost
from .layout import VisualLayout
from .pairs import LanePairs, lane_pairs, near_pairs
from .plan import Neighborhood, VisualPlan
from .schedule import LayerWork, schedule
from .shapes import ModelShape

_GATED_FFN = 3  # matrices of a gated FFN: gate, up, down


def executed(shape: ModelShape, plan: VisualPlan, layout: VisualLayout, text_tokens: int) -> tuple[PassCost, PassCost]:
    """Prefill and one decode step as the patched model runs them, decoder only. Head budgets must be resolved."""
    pairs = lane_pairs(layout, text_tokens)
    work = schedule(plan, shape.heads, shape.kv_heads, shape.ffn)
    samples, visual_rows = layout.batch_size, layout.num_visual
    keys = samples * (text_tokens + 1)  # text keys that the rows of a decode step read
    zero = plan.semantics == "zero"
    prefill, decode = [], []
    for item in work:
        visual = _visual_lane(shape, item, layout, pairs)
        text = _text_lane(shape, item, samples * text_tokens, pairs.text_text, pairs.text_visual, zero)
        prefill.append(LayerCost(visual, text))
        decode.append(LayerCost(LaneCost(), _text_lane(shape, item, samples, keys, visual_rows, zero)))
    return PassCost(tuple(prefill)), PassCost(tuple(decode))


def _visual_lane(shape: ModelShape, work: LayerWork, layout: VisualLayout, pairs: LanePairs) -> LaneCost:
    queries = len(work.query_heads)
    scores = 0
    if queries:
        near = isinstance(work.attention, Neighborhood)
        own = near_pairs(work.attention, layout) if near else pairs.visual_causal
        # in heads whose weights on visual values are zeroed, only the product with the keys is run for them
        valued = len(set(work.query_heads) & set(work.value_heads))
        scores = 2 * shape.head_dim * (queries * (own + 2 * pairs.visual_text) + valued * own)
    per_head = 2 * layout.num_visual * shape.hidden * shape.head_dim
    return LaneCost(
        qkv=per_head * (queries + 2 * len(work.key_heads)),
        scores=scores,
        out=per_head * queries,
        ffn=2 * _GATED_FFN * layout.num_visual * shape.hidden * _count(work.neurons),
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


def paper(shape: ModelShape, plan: VisualPlan, layout: VisualLayout, text_tokens: int) -> tuple[PassCost, None]:
    """FLOPs of the visual tokens, 2(4nd^2 + 2n^2 d + 3ndm) a layer scaled by the plan (arXiv 2410.06169).

    Projections and scores by the share of active heads, n keys of a query replaced by the mean size of its
    neighbourhood, the FFN by its share of neurons; a layer whose rows do not attend but are read pays for K and V only
    (4nd^2). Layers after the last in which text reads visual tokens are free, whatever the plan's semantics. Grouped
    KV heads are ignored: the formula is that of MHA at the model's width.
    """
    return _nominal(shape, plan, layout, per_mac=2, ffn_matrices=3), None


def macs(shape: ModelShape, plan: VisualPlan, layout: VisualLayout, text_tokens: int) -> tuple[PassCost, None]:
    """Multiply-adds of the visual tokens: half of `paper`."""
    return _nominal(shape, plan, layout, per_mac=1, ffn_matrices=3), None


def fastv(shape: ModelShape, plan: VisualPlan, layout: VisualLayout, text_tokens: int) -> tuple[PassCost, None]:
    """Multiply-adds of the visual tokens as FastV writes them, 4nd^2 + 2n^2 d + 2ndm: two FFN matrices, not three."""
    return _nominal(shape, plan, layout, per_mac=1, ffn_matrices=2), None


def _nominal(shape: ModelShape, plan: VisualPlan, layout: VisualLayout, per_mac: int, ffn_matrices: int) -> PassCost:
    active = [shape.heads if layer.heads is None else sum(layer.heads) for layer in plan.layers]
    last_read = max((i for i, layer in enumerate(plan.layers) if layer.text_reads and active[i]), default=-1)
    row_width = per_mac * layout.num_visual * shape.hidden  # one row of every token against one column of weights
    layers = []
    for index, layer in enumerate(plan.layers):
        if index > last_read:
            layers.append(LayerCost(LaneCost()))
            continue
        attends = layer.attention != "none"
        width = round(shape.hidden * active[index] / shape.heads)
        projections = 3 if attends else 2 if layer.text_reads else 0
        visual = LaneCost(
            qkv=row_width * projections * width,
            scores=per_mac * 2 * _nominal_pairs(layer.attention, layout) * width,
            out=row_width * width if attends else 0,
            ffn=row_width * ffn_matrices * _count(layer.neurons(shape.ffn)),
        )
        layers.append(LayerCost(visual))
    return PassCost(tuple(layers))


def _nominal_pairs(attention: str | Neighborhood, layout: VisualLayout) -> int:
    if attention == "none":
        return 0
    if isinstance(attention, Neighborhood):
        return near_pairs(attention, layout)
    tokens = [0] * layout.batch_size
    for segment in layout.segments:
        tokens[segment.sample] += segment.size
    return sum(count * count for count in tokens)


def _count(neurons: int | tuple[int, ...]) -> int:
    return neurons if isinstance(neurons, int) else len(neurons)
