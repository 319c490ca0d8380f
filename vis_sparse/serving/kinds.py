"""What each decoder layer does with visual rows, for every plan that an engine has loaded.

An engine with a paged KV cache can run a plan by choosing which rows enter a layer and which keys they read. Three
kinds of attention cover the plans without neighbourhoods and head masks, and each is written in one number, so that a
batch whose requests follow different plans is an array of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plans.layer_plan import Neighborhood
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork, schedule
from .errors import ServingError

ALL = 0  # visual rows are queries: the layer's attention is the model's own
READ = 1  # text rows alone are queries; they read visual keys, which are written from the rows as they are
TEXT = 2  # text rows alone are queries, and read text alone; no visual key exists


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """One layer under all loaded plans, in their order.

    attention: ALL, READ or TEXT of each plan. neurons: the FFN neurons that visual rows use, a count of first ones or
    indices; 0 if they skip the FFN.
    """

    attention: tuple[int, ...]
    neurons: tuple[int | tuple[int, ...], ...]

    @property
    def is_dense(self) -> bool:
        """Whether the attention is the model's own under every plan."""
        return set(self.attention) == {ALL}


def layer_kinds(
    plans: Sequence[VisualPlan], num_heads: int, num_kv_heads: int, ffn_size: int
) -> tuple[LayerKinds, ...]:
    """What each layer does under each of `plans`. Raises ServingError for a plan that a paged cache cannot run."""
    works = []
    for plan in plans:
        _check(plan)
        works.append(schedule(plan, num_heads, num_kv_heads, ffn_size))
    return tuple(
        LayerKinds(
            tuple(_kind(work, plan.name, index) for plan, work in zip(plans, layer)),
            tuple(work.neurons if work.neurons != () else 0 for work in layer),
        )
        for index, layer in enumerate(zip(*works))
    )


def _check(plan: VisualPlan) -> None:
    where = f"plan {plan.name!r}"
    if plan.semantics != "exclude":
        raise ServingError(
            f"{where}: semantics: got {plan.semantics!r}, expected 'exclude' (the official arithmetic keeps every "
            "visual key and row, so that an engine would save nothing; run such checkpoints with vis_sparse.patch)"
        )
    if plan.tower is not None:
        raise ServingError(
            f"{where}: tower: got a section for the vision encoder, expected none (the engine runs an encoder of its "
            "own; run the plan with vis_sparse.patch)"
        )
    if plan.before is not None:
        raise ServingError(
            f"{where}: before: got {plan.before.to_data()}, expected all tokens (the engine gives every visual token "
            "of a prompt its slot before anybody knows which ones come in; run the plan with vis_sparse.patch)"
        )
    for index, layer in enumerate(plan.layers):
        here = f"{where}, layer {index}"
        if isinstance(layer.attention, Neighborhood):
            raise ServingError(
                f"{here}: attention: got a neighborhood, expected full or none (the engine's attention kernels read "
                "whole blocks of keys and mask by position alone; they have no two-dimensional windows)"
            )
        if layer.heads is not None and not (isinstance(layer.heads, tuple) and all(layer.heads)):
            raise ServingError(
                f"{here}: heads: got a mask or a budget, expected all (a layer's block table holds for all of its KV "
                "heads, so the engine's kernels cannot leave visual keys out of some heads alone)"
            )
        if layer.tokens is not None:
            raise ServingError(
                f"{here}: tokens: got {{keep: {layer.tokens.keep}}}, expected all (which tokens stay depends on the "
                "prompt's later text, which a chunk or a shared prefix does not know)"
            )


def _kind(work: LayerWork, plan: str, index: int) -> int:
    if work.query_heads and not work.reads:
        raise ServingError(
            f"plan {plan!r}, layer {index}: got attention full with text_reads off, expected text_reads on or "
            "attention none (text and visual rows would need different caches in one layer)"
        )
    if work.query_heads:
        return ALL
    return READ if work.reads else TEXT
