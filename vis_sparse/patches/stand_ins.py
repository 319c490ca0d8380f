"""What stands in a patched model's places. Each function takes the `PatchState` and what stood there before."""

from __future__ import annotations

from contextvars import ContextVar

import numpy as np
import torch

from ..executor.transformers_internals import cache_among, is_fixed, named_as_before, noted_said, traced_as_before
from ..layout.layout import VisualLayout
from .arguments import unbound
from .errors import PatchError
from .family import Running, bound, prompt_ends
from .scopes import held, hold
from .static import AROUND_LANES
from .wraps import check_text_model

# The call of an outer model that runs in this context.
RUNNING: ContextVar[tuple[object, Running] | None] = ContextVar("vis_sparse_running", default=None)


def text_forward(state, plain, *args, **kwargs):
    # a compiler may look into a decode step on a static cache, into nothing else
    if _is_traced_step(kwargs):
        return state.forward(*args, **traced_as_before(kwargs))
    return _text_around_lanes(state, *args, **kwargs)


def _is_traced_step(kwargs: dict) -> bool:
    return torch.compiler.is_compiling() and is_fixed(cache_among(kwargs))


@torch.compiler.disable(recursive=False, reason=AROUND_LANES)
def _text_around_lanes(state, *args, **kwargs):
    return state.forward(*args, **named_as_before(kwargs))


def outer_forward(state, plain, *args, **kwargs):
    if _is_traced_step(kwargs):
        return plain(*args, **kwargs)
    return _outer_around_lanes(state, plain, *args, **kwargs)


@torch.compiler.disable(recursive=False, reason=AROUND_LANES)
def _outer_around_lanes(state, plain, *args, **kwargs):
    """The outer model's forward, within which its layout is known."""
    args, running = unbound(state.outer, args), Running()
    check_text_model(state.outer, state.family.text_model(state.outer), state.text_model)
    token = RUNNING.set((state, running))
    try:
        running.layout = _read_layout(state, args, kwargs)
        return plain(*args, **kwargs)
    finally:
        RUNNING.reset(token)


@torch.compiler.disable
def _read_layout(state, args, kwargs) -> VisualLayout | None:
    arguments = bound(type(state.outer).forward, state.outer, args, kwargs)
    past = cache_among(arguments)
    state.running.plan = state.plan_of(past) if state.tower is not None else None
    for name, encoded in (arguments.get("mm_encoder_outputs") or {}).items():
        state.running.said[name] = noted_said(encoded)
    return state.family.read_layout(state.outer, arguments, 0 if past is None else past.get_seq_length())


def labelled_forward(state, plain, *args, **kwargs):
    if _is_traced_step(kwargs):
        return plain(*args, **kwargs)
    return _labelled_around_lanes(state, plain, *args, **kwargs)


@torch.compiler.disable(recursive=False, reason=AROUND_LANES)
def _labelled_around_lanes(state, plain, *args, **kwargs):
    """The whole model's forward: labels tell where the prompt ends."""
    args = unbound(state.model, args)
    if not any(executor.asks_for_prompts for executor in state.executors.values()):
        return plain(*args, **kwargs)
    arguments = bound(type(state.model).forward, state.model, args, kwargs)
    labels, past = arguments.get("labels"), cache_among(arguments)
    if labels is None:
        return plain(*args, **kwargs)
    with hold(state.text_model, "prompt_ends", prompt_ends(labels) + (0 if past is None else past.get_seq_length())):
        return plain(*args, **kwargs)


def generate(state, plain, *args, vis_sparse_plan: str | None = None, **kwargs):
    """The model's `generate`, under a plan if one is named, with the prompt's length known to all its calls."""
    given = (*(kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")), *args[:1])
    prompt = next((each for each in given if isinstance(each, torch.Tensor)), None)
    if vis_sparse_plan is not None and vis_sparse_plan not in state.plans:
        raise PatchError(
            f"vis_sparse_plan: got {vis_sparse_plan!r}, expected one of {', '.join(state.plans)}, those given to patch"
        )
    asked = held(state.text_model, "plan") if vis_sparse_plan is None else vis_sparse_plan
    if asked is None and state.tower is not None:
        asked = state.plan_of(cache_among(kwargs))  # encoders run before anybody looks at the cache
    # where the outer model splices features in, its columns are known later, and noted then
    spliced = state.model is state.outer or prompt is None
    generating = Running(prompt_ends=None if spliced else np.array([prompt.shape[1]]))
    with hold(state.text_model, "plan", asked), hold(state.text_model, "generating", generating):
        return plain(*args, **kwargs)


def apply(state, plain, *args, **kwargs):
    """`to`, `half`, `cuda`, ... of the text model: copies of the old weights go at once, and what was recorded."""
    try:
        return plain(*args, **kwargs)
    finally:
        for executor in state.executors.values():
            executor.kept_cuts.forget()
        state.forget_graphs()
