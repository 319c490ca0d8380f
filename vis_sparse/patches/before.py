"""Tokens before the decoder: what a call tells of its visual tokens, and which of them come in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch

from ..executor.before_scores import change, relevance
from ..executor.token_scores import on_host
from ..executor.tokens import entering
from ..layout.layout import LayoutError, VisualLayout
from ..layout.packing import Coordinates, visual_coordinates
from ..plans.before import TokensBefore
from ..plans.plan import VisualPlan
from .arguments import Asked
from .errors import PatchError
from .family import Family

# What the encoder's calls of a context say of their tokens, one array a call: (tokens,), in the order of their grids.
_SAID: ContextVar[list[np.ndarray] | None] = ContextVar("vis_sparse_said", default=None)


def check_family(family: Family, plans: Mapping[str, VisualPlan]) -> None:
    """Raise PatchError for an order by which the family's tokens cannot be chosen."""
    for plan in plans.values():
        if plan.before is not None and plan.before.by in family.not_before:
            raise PatchError(
                f"plan {plan.name!r}: before.by: got {plan.before.by} for {family.classes[0]}, expected another order: "
                f"{family.not_before[plan.before.by]}"
            )


@contextmanager
def listening() -> Iterator[list[np.ndarray]]:
    """What the encoder says of its tokens within the block."""
    said: list[np.ndarray] = []
    token = _SAID.set(said)
    try:
        yield said
    finally:
        _SAID.reset(token)


def say(values: np.ndarray) -> None:
    """Of an encoder's call."""
    said = _SAID.get()
    if said is not None:
        said.append(values)


def tokens_of_call(
    before: TokensBefore, asked: Asked, embeds: torch.Tensor, said: Mapping[str, np.ndarray], ends: np.ndarray | None
) -> np.ndarray | None:
    """The packed visual rows of a call that come into the decoder, ascending; None if all do.

    embeds: (batch, length, hidden), features in their places. said: by modality, what the encoder said of its tokens.
    ends: (batch,) columns behind the prompts.
    """
    visual, scores = visual_coordinates(asked.layout), None
    if before.needs_tower:
        scores = _in_place(before, asked.layout, said)
    elif before.by != "stride" and not embeds.is_meta:
        rows = embeds.detach().flatten(0, 1)
        rows = rows[torch.from_numpy(visual.sample * asked.length + visual.column - asked.past).to(rows.device)]
        by_text = before.by == "relevance"
        scores = on_host(_relevance(before, asked, embeds, rows, visual, ends) if by_text else change(rows, visual))
    kept = entering(before, visual, scores)
    return None if len(kept) == len(visual.sample) else kept


def _relevance(before: TokensBefore, asked: Asked, embeds, rows, visual: Coordinates, ends) -> torch.Tensor:
    batch, columns = asked.layout.batch_size, asked.past + np.arange(asked.length)
    is_text = np.ones((batch, asked.length), dtype=bool) if asked.mask is None else asked.mask[:, asked.past :].copy()
    is_text[visual.sample, visual.column - asked.past] = False
    if ends is not None:
        is_text &= columns < ends[:, None]
    scores = []
    for segment in np.unique(visual.segment):
        own = np.flatnonzero(visual.segment == segment)
        sample = visual.sample[own[0]]
        if not is_text[sample].any():
            raise LayoutError(
                f"before: got a call with visual tokens and no text in sample {sample}, expected text of the prompt in "
                "every call with images (by relevance, it chooses)"
            )
        text = embeds.detach()[sample, torch.from_numpy(is_text[sample]).to(embeds.device)]
        scores.append(relevance(rows[own[0] : own[-1] + 1], text, before.count(len(own))))
    return torch.cat(scores)


def _in_place(before: TokensBefore, layout: VisualLayout, said: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the encoder said, in the order of the packed rows."""
    placed = []
    for modality in sorted({segment.modality for segment in layout.segments}):
        segments = [(index, s) for index, s in enumerate(layout.segments) if s.modality == modality]
        own, wanted = said.get(modality), sum(segment.size for _, segment in segments)
        if own is None or not len(own) or wanted % len(own) or layout.batch_size % (wanted // len(own)):
            given = "no call of the vision tower" if own is None else f"{len(own)} tokens of the vision tower"
            raise LayoutError(
                f"before: got {given} for {wanted} {modality} tokens, expected those of the call's own pixels "
                f"(by {before.by}, the tower's call of the patched model says which tokens come in)"
            )
        # beams and several answers repeat each sample in place, and what was said of it with it
        times, start, first = wanted // len(own), 0, 0
        for sample in range(layout.batch_size):
            if sample % times == 0:
                first = start
            start = first
            for index, segment in segments:
                if segment.sample == sample:
                    placed.append((index, own[start : start + segment.size]))
                    start += segment.size
    return np.concatenate([values for _, values in sorted(placed, key=lambda each: each[0])])
