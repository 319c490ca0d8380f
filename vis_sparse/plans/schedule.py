"""What each decoder layer has to compute under a plan: the liveness of visual rows and K/V, worked out once.

Both the executor (`lanes.py`) and the count (`cost.py`) read this schedule, so that they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layer_plan import LayerPlan, Neighborhood, PlanError, TokenBudget
from .plan import VisualPlan


@dataclass(frozen=True, slots=True)
class LayerWork:
    """The visual work of one layer.

    query_heads: query heads in which visual rows are queries; empty if visual rows skip attention.
    key_heads: KV heads whose visual K (and V) are computed; empty if nobody reads them.
    value_heads: query heads whose weights on visual values count; the others read zeros ("zero" semantics only).
    attention: "none" if the layer's attention leaves visual rows as they are. That is not what no query head means: if
    a plan lets rows attend in no head, they still get the output projection's bias.
    reads: text queries see the visual keys of `key_heads` (in "zero" semantics also when every value is zeroed).
    stores: the visual K/V go into the cache.
    neurons: FFN neurons of visual rows, a count of first ones or indices; 0 if they skip the FFN.
    tokens: which visual rows go on to the next layer; None if all do, or if no later layer reads them anyway.
    """

    query_heads: tuple[int, ...]
    key_heads: tuple[int, ...]
    value_heads: tuple[int, ...]
    attention: str | Neighborhood
    reads: bool
    stores: bool
    neurons: int | tuple[int, ...]
    tokens: TokenBudget | None = None

    @property
    def updates(self) -> bool:
        """Whether the layer changes the visual rows."""
        return bool(self.query_heads) or self.neurons not in (0, ())


def schedule(plan: VisualPlan, num_heads: int, num_kv_heads: int, ffn_size: int) -> tuple[LayerWork, ...]:
    """The work of every layer for a model of these sizes. Head budgets must be resolved to masks before.

    Under "exclude", visual rows are updated only while a later layer reads them; a wholly dense plan keeps them to
    the end, so that all its output rows are the unpatched model's. Under "zero" nothing stops, as in the official
    code.
    """
    plan.check_fits(plan.num_layers, num_heads, ffn_size)
    group = num_heads // num_kv_heads
    work, needed = [], plan.is_dense or plan.semantics == "zero"
    for layer in reversed(plan.layers):
        heads = _active_heads(layer, num_heads)
        build = _zero if plan.semantics == "zero" else _exclude
        item = build(layer, heads, group, num_kv_heads, ffn_size, needed)
        needed = needed or item.reads
        work.append(item)
    return tuple(reversed(work))


def _active_heads(layer: LayerPlan, num_heads: int) -> tuple[int, ...]:
    if layer.heads is None:
        return tuple(range(num_heads))
    if not isinstance(layer.heads, tuple):
        raise PlanError(f"heads: got {layer.heads}, expected a mask (resolve the heads first)")
    return tuple(index for index, active in enumerate(layer.heads) if active)


def _exclude(layer, heads, group, num_kv_heads, ffn_size, needed) -> LayerWork:
    attention = layer.attention if needed else "none"
    query_heads = heads if attention != "none" else ()
    reads = layer.text_reads and bool(heads)
    key_heads = tuple(sorted({head // group for head in heads})) if reads or query_heads else ()
    # a later segment's full attention reads this one's keys, in whatever call it comes
    stores = reads or (bool(query_heads) and attention == "full")
    neurons = layer.neurons(ffn_size) if needed else 0
    tokens = layer.tokens if needed else None
    return LayerWork(query_heads, key_heads, heads, attention, reads, stores, neurons, tokens)


def _zero(layer, heads, group, num_kv_heads, ffn_size, needed) -> LayerWork:
    attends = layer.attention != "none"
    query_heads = heads if attends else ()
    value_heads = heads if layer.text_reads else ()
    every = tuple(range(num_kv_heads))
    return LayerWork(query_heads, every, value_heads, layer.attention, True, True, layer.neurons(ffn_size))


def tower_schedule(plan: VisualPlan, num_heads: int, ffn_size: int, has_globals: bool) -> tuple[LayerWork | None, ...]:
    """The work of every layer of a vision encoder on its patches; None for a layer that is off, for global tokens too.

    All rows are wanted behind the last layer, so nothing stops before it. has_globals: whether class tokens read the
    keys of patches. Head budgets must be resolved to masks before.
    """
    plan.check_fits(plan.num_layers, num_heads, ffn_size)
    return tuple(_of_tower(layer, num_heads, ffn_size, has_globals) for layer in plan.layers)


def _of_tower(layer: LayerPlan, num_heads: int, ffn_size: int, has_globals: bool) -> LayerWork | None:
    if layer == LayerPlan.off():
        return None
    heads, attends = _active_heads(layer, num_heads), layer.attention != "none"
    key_heads = heads if attends or has_globals else ()
    query_heads, neurons = heads if attends else (), layer.neurons(ffn_size)
    return LayerWork(query_heads, key_heads, heads, layer.attention, has_globals, False, neurons, layer.tokens)
