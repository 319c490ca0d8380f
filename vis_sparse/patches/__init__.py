"""Patching: one verb for every family. A family is one short module here; `docs/new_family.md` shows how to add one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from ..cost.flops import flops
from ..executor.decoder import Decoder
from ..kernels import Backend, get_backend
from ..layout.layout import VisualLayout
from ..plans.budgets import resolve_heads, resolve_tower
from ..plans.carried import read_block
from ..plans.files import as_plan
from ..plans.layer_plan import PlanError
from ..plans.measured import KEY as MEASURED
from ..plans.measured import MeasuredPlan, boldest, from_text
from ..plans.plan import PlanRecipe, VisualPlan
from ..plans.scores import Calibration
from .before import check_family
from .calibrated import check_heads_file, checked_calibration, checked_tower
from .decoder import read_decoder
from .errors import PatchError
from .family import Family
from .internvl import INTERNVL
from .llava import LLAVA, VIP_LLAVA
from .llava_next import LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION
from .original_llava import ORIGINAL_LLAVA
from .qwen_vl import QWEN2_VL, QWEN3_VL
from .saving import carried_block, save_block
from .scopes import hold
from .state import PatchState
from .tower import check_tower, find_tower, read_tower
from .tower_patch import PatchedTower, needs_tower
from .verify import check_behaviour
from .wraps import check_devices, check_no_wrapper

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
    if isinstance(model, nn.Module):
        check_no_wrapper(model)
    supported = ", ".join(name for family in FAMILIES for name in family.classes)
    raise PatchError(f"model: got {type(model).__name__}, expected one of {supported}")


def _base(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrappers, which put adapters into its layers."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _text_model(model: nn.Module) -> nn.Module:
    model = _base(model)
    family = family_of(model)
    return family.text_model(family.outer_model(model))


def _state(model: nn.Module) -> PatchState | None:
    model = _base(model)
    return getattr(family_of(model).outer_model(model), "_vis_sparse", None)


Plan = VisualPlan | PlanRecipe | str | Path


def patch(
    model: nn.Module,
    plan: Plan | Mapping[str, Plan] | None = None,
    *,
    heads: str | Path | ArrayLike | None = None,
    calibration: Calibration | str | Path | None = None,
    backend: str = "auto",
    verify: bool = True,
    most_loss: float = 0.01,
    graphs: bool = False,
) -> nn.Module:
    """Make `model` compute on its visual tokens only what `plan` asks for. In place; returns the model.

    plan: a plan, a recipe, a shipped plan's name, a YAML file, a folder or a repository of the Hub with a plan
    (`load_plan`); "auto" is the family's conservative, training-free plan. Several by names of your own: the first is
    the one that calls run under, unless they say another (`use_plan`, `generate(..., vis_sparse_plan=name)`). None:
    what the model's checkpoint carries, if it was saved from a patched model, or else "auto". heads: for plans with
    head budgets, a file or array (layers, heads) of masks or scores; "first" keeps the first heads (random weights
    only). calibration: a `Calibration`, its file or repository, for head and neuron budgets. backend: "auto" (Triton
    on a GPU, torch elsewhere), "torch", "triton", "flex" or "reference" (docs/kernels.md). verify: run the text model
    once on a few rows, as it is and in lanes that compute everything, and refuse it if they differ; once a model, not
    on the meta device. most_loss: with "auto" and a calibration that holds measured plans (`vis-sparse calibrate
    --plans`), the boldest one is taken whose KL from the dense answers is at most so many nats, and whose share of
    right answers is at most so far below; `inspect` has the numbers. graphs: record decode steps and run them as graphs
    (CUDA graphs on a GPU, through `torch.compile` elsewhere), one for each batch size and bucket of cached tokens;
    what cannot be recorded (gradients, hooks, adapters, `output_hidden_states`) runs as without.

    A second patch replaces the first. Weights are not changed. `save_pretrained` of a patched model writes its plans
    into config.json, or beside an adapter. Raises PatchError for a model that is not supported and PlanError for a
    plan that does not fit it; the model is then as it was.
    """
    model, whole = _base(model), model
    family = family_of(model)
    outer = family.outer_model(model)
    check_devices(getattr(model, "hf_device_map", None))
    family.check(outer)
    decoder = read_decoder(family.text_model(outer))
    calibration = checked_calibration(calibration, model, family.text_model(outer), decoder)
    check_heads_file(heads, model, family.text_model(outer))
    if plan is None:
        block = carried_block(model)
        plan = "auto" if block is None else read_block(block)
    given = plan if isinstance(plan, Mapping) else {None: plan}
    if not given or not all(isinstance(name, str) for name in given if isinstance(plan, Mapping)):
        raise PlanError(f"plan: got {plan!r}, expected a plan, or plans by name")
    measured = _measured(calibration, most_loss) if "auto" in given.values() else None
    chosen = {name: measured.plan if measured and each == "auto" else each for name, each in given.items()}
    plans = {name: _resolved(family, each, decoder, heads, calibration) for name, each in chosen.items()}
    if not isinstance(plan, Mapping):
        plans = {only.name: only for only in plans.values()}
    try:
        kernels = get_backend(backend)
    except ValueError as error:
        raise PatchError(str(error)) from None
    if graphs and kernels.name not in ("auto", "torch", "triton"):
        raise PatchError(f"graphs: got True with backend {kernels.name}, expected auto, torch or triton")
    check_family(family, plans)
    plans, tower = _with_towers(family, outer, plans, heads, calibration, kernels)
    state, before = PatchState(family, model, decoder, plans, kernels, whole, graphs), _state(model)
    state.measured, state.tower = measured, tower
    if before is not None:
        before.remove()
    try:
        if verify:
            check_behaviour(state.text_model, decoder, kernels)
            if tower is not None:
                check_tower(tower.kind, tower.module, tower.tower, kernels)
        state.install()
    except BaseException:
        if before is not None:
            before.install()
        raise
    return whole


def _measured(calibration: Calibration | None, most_loss: float) -> MeasuredPlan | None:
    """What "auto" chooses from a calibration's measured plans; None if it has none."""
    text = None if calibration is None else calibration.metadata.get(MEASURED)
    return None if text is None else boldest(from_text(text), most_loss)


def _resolved(family: Family, plan: Plan, decoder: Decoder, heads, calibration) -> VisualPlan:
    """A plan for the decoder, its budgets turned into masks and indices."""
    name = family.auto_plan if isinstance(plan, str) and plan == "auto" else plan
    resolved = as_plan(name, len(decoder.layers))
    resolved.check_fits(len(decoder.layers), decoder.num_heads, decoder.ffn_size)
    resolved = resolve_heads(resolved, decoder.num_heads, decoder.num_kv_heads, heads, calibration)
    resolved.check_fits(len(decoder.layers), decoder.num_heads, decoder.ffn_size)
    return resolved


def _with_towers(
    family: Family,
    outer: nn.Module,
    plans: Mapping[str, VisualPlan],
    heads,
    calibration: Calibration | None,
    kernels: Backend,
) -> tuple[dict[str, VisualPlan], PatchedTower | None]:
    """Plans with their tower sections resolved for the model's encoder, and the encoder under them."""
    asking = next((plan for plan in plans.values() if needs_tower(plan)), None)
    if asking is None:
        return dict(plans), None
    kind, module = find_tower(family.towers, outer, f"plan {asking.name!r}")
    tower = read_tower(kind, module)
    sizes = len(tower.layers), tower.num_heads, tower.ffn_size
    first = heads if isinstance(heads, str) and heads == "first" else None
    scores = checked_tower(calibration, module, tower)
    plans = {name: resolve_tower(plan, *sizes, first, scores) for name, plan in plans.items()}
    return plans, PatchedTower(kind, module, tower, plans, kernels, family.merge(outer))


def save_plan(model: nn.Module, folder: str | Path) -> None:
    """Write the plans of a patched model into a folder that holds its checkpoint (config.json) or an adapter.

    `save_pretrained` of a patched model does it; this is for what was saved otherwise, such as an adapter of
    `get_peft_model(vis_sparse.patch(model))`, of which the patch knows nothing. Raises PatchError for a model that is
    not patched and for a folder that holds neither.
    """
    _patched_text_model(model, "save_plan")
    save_block(_state(model).block, Path(folder))


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`; a model that is not patched is left as it is. Returns the model."""
    state = _state(model)
    if state is not None:
        state.remove()
    return model


@contextmanager
def patched(
    model: nn.Module,
    plan: Plan | Mapping[str, Plan] | None = None,
    *,
    heads: str | Path | ArrayLike | None = None,
    calibration: Calibration | str | Path | None = None,
    backend: str = "auto",
    verify: bool = True,
    most_loss: float = 0.01,
    graphs: bool = False,
) -> Iterator[nn.Module]:
    """`patch` for the length of a `with` block; afterwards the model is as it was, an earlier patch included."""
    before = _state(model)
    given = {"heads": heads, "calibration": calibration, "backend": backend, "verify": verify, "most_loss": most_loss}
    given["graphs"] = graphs
    patch(model, plan, **given)
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


def is_patched(model: nn.Module) -> bool:
    """Whether calls of the model run under a plan of `patch`."""
    return _state(model) is not None


def read_layout(model: nn.Module, inputs: Mapping) -> VisualLayout | None:
    """Where the visual tokens lie in `inputs`, a whole batch of prompts as the model's processor makes it; None if the
    inputs do not tell. The model need not be patched."""
    family = family_of(model)
    return family.read_layout(family.outer_model(model), dict(inputs), 0)


@contextmanager
def use_layout(model: nn.Module, layout: VisualLayout) -> Iterator[None]:
    """Tell a patched model where the visual tokens lie, for callers who merge image embeddings themselves.

    layout: positions are columns of the padded batch, counted from the start of the whole sequence (cached columns
    included), so that one layout serves prefill, its chunks and decode. It holds for calls made inside the block, in
    this thread or task; held open by a generator, for calls from inside the generator. Raises PatchError on an
    unpatched model.
    """
    with hold(_patched_text_model(model, "use_layout"), "layout", layout):
        yield


@contextmanager
def use_plan(model: nn.Module, name: str) -> Iterator[None]:
    """Calls inside the block run under plan `name`, one of those given to `patch(model, {name: plan, ...})`.

    A KV cache belongs to the plan it was filled under: without this, calls with a cache run under its plan; with it, a
    cache of another plan is refused. Raises PatchError on an unpatched model and for a name that it does not have.
    """
    text_model, plans = _patched_text_model(model, "use_plan"), _state(model).plans
    if name not in plans:
        raise PatchError(f"plan: got {name!r}, expected one of {', '.join(plans)}, those given to patch")
    with hold(text_model, "plan", name):
        yield


@contextmanager
def use_prompt(model: nn.Module, length: int | Sequence[int]) -> Iterator[None]:
    """Tell a patched model where its prompts end, for calls that hold answers too (log-likelihoods without labels).

    length: columns of the prompt, padding and cached columns included; one, or one a sample. Plans whose tokens go on
    `by: attention` choose them by the prompt's last text row. `generate` and calls with labels know it themselves;
    otherwise a call is taken for a prompt. Raises PatchError on an unpatched model.
    """
    with hold(_patched_text_model(model, "use_prompt"), "prompt_ends", np.atleast_1d(length)):
        yield


def _patched_text_model(model: nn.Module, asked_by: str) -> nn.Module:
    if not is_patched(model):
        raise PatchError(f"{asked_by}: got a model that is not patched, expected vis_sparse.patch(model) before")
    return _text_model(model)


@dataclass(frozen=True)
class LastCall:
    """A call that ran in lanes: its segments, columns, columns cached before it, text rows a sample (those of the
    longest text), and how many of its visual tokens came into the decoder."""

    layout: VisualLayout
    length: int
    past: int
    text_length: int
    entered: int


def inspect(model: nn.Module) -> dict[str, Any] | None:
    """What a patched model does; None if it is not patched.

    plan: of the last call in lanes, the default one before; plans: all, by name; backend; extra_bytes: weight copies
    kept now; last_call: segments and lengths of the last call in lanes; flops, flops_dense: the decoder's executed
    FLOPs of the last whole prompt with visual tokens, and those of the dense plan, if there was one. measured: a
    `MeasuredPlan` if "auto" chose by a calibration's measurements: what the plan costs and loses on held-out samples.
    """
    state = _state(model)
    if state is None:
        return None
    name, packing = state.last or (state.default, None)
    counted, last = {}, None
    if packing is not None:
        last = LastCall(packing.layout, packing.length, packing.past, packing.longest_text, packing.num_visual)
    if state.last_prompt is not None:
        asked, prompt = state.last_prompt
        plans = {"flops": state.plans[asked], "flops_dense": VisualPlan.dense(len(state.text_model.layers))}
        settings = {"layout": prompt.layout_without_padding(), "text_tokens": prompt.num_text // prompt.batch}
        settings["duplicates"] = 1 - prompt.num_visual / prompt.layout.num_visual
        counted = {kind: flops(_base(model), plan, **settings).total for kind, plan in plans.items()}
    return {
        "plan": state.plans[name],
        "plans": dict(state.plans),
        "backend": state.backend.name,
        "extra_bytes": sum(executor.kept_cuts.bytes for executor in state.executors.values())
        + (0 if state.tower is None else state.tower.extra_bytes),
        "last_call": last,
        **({} if state.measured is None else {"measured": state.measured}),
        **counted,
    }
