"""Patching: one verb for every family. A family is one short module here; `docs/new_family.md` shows how to add one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from torch import nn

from ..kernels import get_backend
from ..layout.layout import VisualLayout
from ..plans.budgets import resolve_heads
from ..plans.files import as_plan
from ..plans.plan import PlanRecipe, VisualPlan
from ..plans.scores import Calibration
from .decoder import read_decoder
from .errors import PatchError
from .family import Family
from .internvl import INTERNVL
from .llava import LLAVA, VIP_LLAVA
from .llava_next import LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION
from .original_llava import ORIGINAL_LLAVA
from .qwen_vl import QWEN2_VL, QWEN3_VL
from .state import PatchState

FAMILIES = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_NEXT_VIDEO,
    LLAVA_ONEVISION,
    VIP_LLAVA,
    ORIGINAL_LLAVA,
    QWEN2_VL,
    QWEN3_VL,
    INTERNVL,
)


def family_of(model: nn.Module) -> Family:
    """The family whose classes the model is of. Raises PatchError, with the list of those there are."""
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if names.intersection(family.classes):
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.classes)
    raise PatchError(f"model: got {type(model).__name__}, expected one of {supported}")


def _state(model: nn.Module) -> PatchState | None:
    family = family_of(model)
    return getattr(family.text_model(family.outer_model(model)), "_vis_sparse", None)


def patch(
    model: nn.Module,
    plan: VisualPlan | PlanRecipe | str | Path = "auto",
    *,
    heads: str | Path | ArrayLike | None = None,
    calibration: Calibration | str | Path | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Make `model` compute on its visual tokens only what `plan` asks for. In place; returns the model.

    plan: a plan, a recipe, a shipped plan's name or a YAML file; "auto" is the family's conservative, training-free
    plan. heads: for plans with head budgets, a file or array (layers, heads) of masks or scores; "first" keeps the
    first heads (random weights only). calibration: a `Calibration` or its file, for head and neuron budgets. backend:
    "auto" (Triton on a GPU, torch elsewhere), "torch", "triton", "flex" or "reference" (docs/kernels.md).

    A second patch replaces the first. Weights are not changed. Raises PatchError for a model that is not supported
    and PlanError for a plan that does not fit it; the model is then as it was.
    """
    family = family_of(model)
    outer = family.outer_model(model)
    devices = set((getattr(model, "hf_device_map", None) or {"": 0}).values())
    if len(devices) > 1:
        raise PatchError(f"model: got a device map over {len(devices)} devices, expected a model on one device")
    decoder = read_decoder(family.text_model(outer))
    name = family.auto_plan if isinstance(plan, str) and plan == "auto" else plan
    resolved = as_plan(name, len(decoder.layers))
    resolved.check_fits(len(decoder.layers), decoder.num_heads, decoder.ffn_size)
    resolved = resolve_heads(resolved, decoder.num_heads, decoder.num_kv_heads, heads, calibration)
    resolved.check_fits(len(decoder.layers), decoder.num_heads, decoder.ffn_size)
    try:
        kernels = get_backend(backend)
    except ValueError as error:
        raise PatchError(str(error)) from None
    state = PatchState(family, outer, decoder, resolved, kernels)
    unpatch(model)
    state.install()
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`; a model that is not patched is left as it is. Returns the model."""
    state = _state(model)
    if state is not None:
        state.remove()
    return model


@contextmanager
def patched(
    model: nn.Module,
    plan: VisualPlan | PlanRecipe | str | Path = "auto",
    *,
    heads: str | Path | ArrayLike | None = None,
    calibration: Calibration | str | Path | None = None,
    backend: str = "auto",
) -> Iterator[nn.Module]:
    """`patch` for the length of a `with` block; afterwards the model is as it was, an earlier patch included."""
    before = _state(model)
    patch(model, plan, heads=heads, calibration=calibration, backend=backend)
    try:
        yield model
    finally:
        unpatch(model)
        if before is not None:
            before.install()


@contextmanager
def unpatched(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its patch for the length of a `with` block; afterwards the same patch is back, cuts and all."""
    state = _state(model)
    if state is not None:
        state.remove()
    try:
        yield model
    finally:
        if state is not None:
            state.install()


def read_layout(model: nn.Module, inputs: Mapping) -> VisualLayout | None:
    """Where the visual tokens lie in `inputs`, a whole batch of prompts as the model's processor makes it; None if the
    inputs do not tell. The model need not be patched."""
    family = family_of(model)
    return family.read_layout(family.outer_model(model), dict(inputs), 0)


@contextmanager
def use_layout(model: nn.Module, layout: VisualLayout) -> Iterator[None]:
    """Tell a patched model where the visual tokens lie, for callers who merge image embeddings themselves.

    layout: positions are columns of the padded batch, counted from the start of the whole sequence (cached columns
    included), so that one layout serves prefill, its chunks and decode. Raises PatchError on an unpatched model.
    """
    state = _state(model)
    if state is None:
        raise PatchError("use_layout: got a model that is not patched, expected vis_sparse.patch(model) before")
    before, state.given = state.given, layout
    try:
        yield
    finally:
        state.given = before


@dataclass(frozen=True)
class LastCall:
    """A call that ran in lanes: its segments, columns, columns cached before it, and text rows a sample (those of the
    longest text)."""

    layout: VisualLayout
    length: int
    past: int
    text_length: int


def inspect(model: nn.Module) -> dict[str, Any] | None:
    """What a patched model does; None if it is not patched.

    plan, backend; extra_bytes: weight copies made so far; last_call: segments and lengths of the last call in lanes;
    flops, flops_dense: the decoder's executed FLOPs of that call and those of the dense plan, if it was a whole prompt
    with visual tokens.
    """
    state = _state(model)
    if state is None:
        return None
    counted, last, packing = {}, None, state.last
    if packing is not None:
        last = LastCall(packing.layout, packing.length, packing.past, packing.num_text // packing.batch)
    if last is not None and last.layout.segments and not last.past:
        from ..cost.flops import flops

        layout = packing.layout_without_padding()
        for name, plan in (("flops", state.plan), ("flops_dense", VisualPlan.dense(state.plan.num_layers))):
            counted[name] = flops(model, plan, layout=layout, text_tokens=last.text_length).total
    return {
        "plan": state.plan,
        "backend": state.backend.name,
        "extra_bytes": state.executor.extra_bytes,
        "last_call": last,
        **counted,
    }
