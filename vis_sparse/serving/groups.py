"""Which layers have block tables of their own: those that hold no visual key under the engine's default plan."""

from __future__ import annotations

from collections.abc import Sequence

from .kinds import TEXT, LayerKinds

MOST_GROUPS = 8  # each has block tables, slots and metadata of its own in every step


def worth_two_tables(layers: Sequence[LayerKinds]) -> bool:
    """Whether two kinds of block tables save room, where half of all tokens are visual.

    vLLM splits the layers of each kind into groups of equal size and pads the last: as many layers as the smaller kind
    has, or as the larger has if that is less than half more.
    """
    text = sum(layer.attention[0] == TEXT for layer in layers)
    other = len(layers) - text
    if not text or not other:
        return False
    group = max(text, other) if max(text, other) < 1.5 * min(text, other) else min(text, other)
    of_text, of_other = -(-text // group), -(-other // group)
    return of_text + of_other <= MOST_GROUPS and group * (of_text + 2 * of_other) < 2 * len(layers)


def has_two_tables(layers: Sequence[LayerKinds], vllm_config) -> bool:
    return worth_two_tables(layers) and not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager


def unseen_layers(layers: Sequence[LayerKinds]) -> list[LayerKinds]:
    """Those that hold no visual key under the engine's default plan."""
    return [layer for layer in layers if layer.attention[0] == TEXT]


def unseen_plans(layers: Sequence[LayerKinds]) -> tuple[int, ...]:
    """Plans under which none of those does."""
    unseen = unseen_layers(layers)
    return tuple(
        plan for plan in range(len(layers[0].attention)) if all(layer.attention[plan] == TEXT for layer in unseen)
    )
