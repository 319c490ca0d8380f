"""A request's plan and layout, decided where requests come in, and told to the workers in a note on it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from .errors import ServingError
from .settings import Loaded
from .step import merged_segments
from .tables import fits_blocks

ASKED = "vis_sparse_plan"  # what a client says: extra_args of the sampling parameters, vllm_xargs over HTTP
NOTE = "vis_sparse_note"  # what a worker is told
VISUAL = ("image", "video")


def visual_ranges(features: Iterable) -> list[tuple[int, int]]:
    """Inclusive (first, last) positions of the visual tokens of a request's multimodal features."""
    return [
        each
        for feature in features
        if feature.modality in VISUAL
        for each in feature.mm_position.extract_embeds_range()
    ]


def note_of(loaded: Loaded, ranges: Iterable[tuple[int, int]], asked) -> dict:
    """The plan's index, and whether the request is laid out compactly. Raises ServingError for an unknown plan."""
    segments = merged_segments(ranges)
    return {"plan": loaded.index(asked), "compact": not fits_blocks(segments, loaded.block)}


def salted(note: dict, salt: str | None, loaded: Loaded, lays_out: frozenset[int]) -> str | None:
    """The salt of a request's prefix blocks: of its plan, and its own where its blocks may not be shared.

    lays_out: plans with layers whose text is laid out apart (TEXT).
    """
    parts = [] if salt is None else [salt]
    if note["plan"]:
        parts.append(f"vis_sparse:{loaded.names[note['plan']]}")
    if note["compact"] and note["plan"] in lays_out:
        parts.append(f"vis_sparse:{uuid.uuid4().hex}")
    return "|".join(parts) or None


def asked_plan(extra_args: dict | None):
    """What the client asked for, or None. A note that came from outside is an error."""
    extra_args = extra_args or {}
    if NOTE in extra_args:
        raise ServingError(f"extra_args: got {NOTE}, expected {ASKED} with the name of a plan")
    return extra_args.get(ASKED)
