"""Where the heads of a layer under a plan go: which are stored beside visual keys, and which read them."""

from __future__ import annotations

from dataclasses import dataclass

from ..plans.schedule import LayerWork


@dataclass(frozen=True)
class HeadMap:
    """Where a layer's heads go. Units are KV heads, repeated `expand` times before they are stored.

    seen: units whose visual keys are stored, with the text queries of `seen_queries`; rest: the others. blind: for
    each of seen_queries, whether it must not read visual keys; None if all may. visual_keys: for each visual query
    head, its place among the visual key units; None if they line up group by group. zeroed: places among the key units
    whose visual values count as zero ("zero" semantics).
    """

    expand: int
    keys: tuple[int, ...]
    seen: tuple[int, ...]
    rest: tuple[int, ...]
    seen_queries: tuple[int, ...]
    rest_queries: tuple[int, ...]
    blind: tuple[bool, ...] | None
    visual_keys: tuple[int, ...] | None
    zeroed: tuple[int, ...]


def head_map(work: LayerWork, num_heads: int, num_kv_heads: int, zero: bool) -> HeadMap:
    """The map of one layer's heads; `zero` for that semantics."""
    groups, heads = num_heads // num_kv_heads, range(num_heads)
    # a group of query heads that share values, some of them zeroed, can share them no longer
    expand = groups if zero and 0 < len(work.value_heads) < num_heads else 1
    per_unit = groups // expand
    keys = tuple(unit for head in work.key_heads for unit in range(head * expand, (head + 1) * expand))
    seen = keys if work.stores else ()
    rest = tuple(unit for unit in range(num_kv_heads * expand) if unit not in seen)
    seen_queries = tuple(h for h in heads if h // per_unit in seen)
    rest_queries = tuple(h for h in heads if h // per_unit not in seen)
    readers = work.value_heads if work.reads and not zero else heads if zero else ()
    blind = tuple(h not in readers for h in seen_queries)
    places = tuple(keys.index(h // per_unit) for h in work.query_heads)
    lined_up = places == tuple(i // per_unit for i in range(len(keys) * per_unit))
    zeroed = tuple(i for i, unit in enumerate(keys) if zero and unit * per_unit not in work.value_heads)
    return HeadMap(
        expand,
        keys,
        seen,
        rest,
        seen_queries,
        rest_queries,
        blind if any(blind) else None,
        None if lined_up else places,
        zeroed,
    )
