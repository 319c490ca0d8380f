"""Which heads and neurons are active: masks and scores from files, and budgets resolved to masks and indices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike

from .atomic_write import is_file
from .hub import located
from .layer_plan import HeadBudget, HeadFile, NeuronBudget, PlanError, brief, reason
from .plan import VisualPlan, mask_plan
from .scores import CALIBRATION_FILE, Calibration, TowerScores, keep_heads
from .tensor_file import read_tensors

HEADS_FILES = ("heads.safetensors", "heads.npy", CALIBRATION_FILE)  # of a repository that holds one
# What numpy raises for bytes that are no array.
_UNREADABLE = (
    ValueError, TypeError, EOFError, MemoryError, OverflowError, OSError, SyntaxError, RecursionError, BadZipFile,
    TokenError,
)  # fmt: skip


def load_heads(path: str | Path) -> np.ndarray:
    """A (layers, heads) array: bool masks (True = active) or float scores (higher = more active).

    `.npy` holds the array itself (the official masks' format); `.safetensors` holds it as tensor `heads`. Nothing is
    unpickled. A repository of the Hub (OWNER/NAME) stands for its heads.npy, heads.safetensors or calibration. Raises
    PlanError if the file is missing or holds something else.
    """
    path = Path(located(path, HEADS_FILES, "heads"))
    if not is_file(path):
        raise PlanError(f"heads: got {brief(str(path))}, expected an existing .npy or .safetensors file")
    try:
        array = _load_array(path) if path.suffix == ".npy" else read_tensors(path, ["heads"])[0]["heads"]
        return _checked(array)
    except PlanError as error:
        raise PlanError(f"{error} in {path}") from None
    except (*_UNREADABLE, KeyError) as error:
        given = f"heads: {path}: expected a .npy array or a .safetensors tensor 'heads'"
        raise PlanError(f"{given} ({reason(error)})") from None


def _load_array(path: Path) -> np.ndarray:
    # mapped: a header that claims more than there is allocates nothing
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays")
    return np.array(array)


def _checked(array) -> np.ndarray:
    try:
        array = np.asarray(array)
    except ValueError as error:  # rows of several lengths
        raise PlanError(f"heads: got {brief(array)}, expected an array (layers, heads) ({error})") from None
    if array.dtype == np.uint8:
        array = array.astype(bool)
    if array.ndim != 2 or array.dtype.kind not in "bf":
        raise PlanError(
            f"heads: got {array.dtype} of shape {array.shape}, expected bool masks or float scores (layers, heads)"
        )
    if np.isnan(array).any():
        raise PlanError("heads: got NaN among the scores, expected numbers")
    return array


def resolve_heads(
    plan: VisualPlan,
    num_heads: int,
    num_kv_heads: int,
    heads: str | Path | ArrayLike | None = None,
    calibration: Calibration | TowerScores | str | Path | None = None,
) -> VisualPlan:
    """`plan` with every head budget and head file turned into a mask, and every neuron budget into indices.

    heads: None; a file for `load_heads`; a (layers, heads) array of masks, which replaces the plan's own, or of
    scores, from which budgets keep the highest; or "first", for which budgets keep the first heads and neurons (for
    counting and for random weights: it says nothing about trained ones). calibration: a `Calibration` or its file, for
    neuron budgets, and for head budgets where heads is None. Raises PlanError if a budget is left without scores.
    """
    if isinstance(calibration, str | Path):
        calibration = Calibration.load(calibration)
    if not isinstance(calibration, Calibration | TowerScores | None):
        raise PlanError(f"calibration: got {brief(calibration)}, expected a Calibration or its file")
    if heads is None and calibration is not None:
        heads = calibration.heads
    if isinstance(heads, str | Path) and heads != "first":
        heads = load_heads(heads)
    if heads is not None and not isinstance(heads, str):
        heads = _checked(heads.cpu().numpy() if hasattr(heads, "cpu") else heads)
        expected = (plan.num_layers, num_heads)
        if heads.shape != expected:
            raise PlanError(f"heads: got shape {heads.shape}, expected (layers, heads) = {expected}")
    if isinstance(heads, np.ndarray) and heads.dtype.kind == "b":
        plan = mask_plan(plan, heads.tolist())
    masks = _masks(plan, num_heads, num_kv_heads, heads)
    neurons = None if calibration is None else calibration.neurons
    if neurons is not None and len(neurons) != plan.num_layers:
        raise PlanError(f"calibration: got {len(neurons)} layers, expected {plan.num_layers}")
    layers = []
    for index, layer in enumerate(plan.layers):
        mask = masks.get(index, layer.heads)
        ffn = _neurons(plan, index, neurons, heads) if isinstance(layer.ffn, NeuronBudget) else layer.ffn
        layers.append(dataclasses.replace(layer, heads=mask, ffn=ffn))
    return plan.replace(layers=tuple(layers))


def resolve_tower(
    plan: VisualPlan,
    num_layers: int,
    num_heads: int,
    ffn_size: int,
    heads: str | None = None,
    calibration: TowerScores | None = None,
) -> VisualPlan:
    """`plan` with its tower, if it has one, made a plan of an encoder of these sizes, budgets resolved.

    heads: "first" lets the first heads and neurons stand in for those of a budget. calibration: of the encoder, for
    budgets. Raises PlanError naming the field if the section does not fit the encoder, or a budget has no scores.
    """
    if plan.tower is None:
        return plan
    try:
        tower = plan.tower
        tower = tower if isinstance(tower, VisualPlan) else tower.resolve(num_layers)
        tower.check_fits(num_layers, num_heads, ffn_size)
        if heads is None and calibration is None:
            _check_no_budget(tower)
        tower = resolve_heads(tower, num_heads, num_heads, heads, calibration)
        tower.check_fits(num_layers, num_heads, ffn_size)
    except PlanError as error:
        raise PlanError(f"plan {plan.name!r}: {error}") from None
    return plan.replace(tower=tower)


def _check_no_budget(tower: VisualPlan) -> None:
    for index, layer in enumerate(tower.layers):
        for field, kind in (("heads", HeadBudget), ("ffn", NeuronBudget)):
            budget = getattr(layer, field)
            if isinstance(budget, kind):
                raise PlanError(
                    f"tower: layer {index}: {field}: got the budget {{keep: {budget.keep}}} and no scores of the "
                    "vision encoder, expected calibration= (what vis_sparse.calibrate gives with tower=True, or its "
                    "file; heads='first' for random weights)"
                )


def _masks(plan: VisualPlan, num_heads: int, num_kv_heads: int, heads) -> dict[int, tuple[bool, ...]]:
    """The masks of the layers that have a file or a budget."""
    masks, sharing = {}, {}
    for index, layer in enumerate(plan.layers):
        if isinstance(layer.heads, HeadFile):
            masks[index] = _from_file(plan, index, num_heads)
        elif isinstance(layer.heads, HeadBudget):
            if heads is None:
                raise PlanError(
                    f"plan {plan.name!r}, layer {index}: heads: got the budget {{keep: {layer.heads.keep}}} and no "
                    "head scores, expected heads= (a file or array of scores or masks; 'first' for random weights)"
                )
            sharing.setdefault(layer.heads, []).append(index)
    for budget, indices in sharing.items():
        if isinstance(heads, str):
            # first heads stand in: as many in every layer
            scores, budget = np.zeros((len(indices), num_heads)), dataclasses.replace(budget, over="layer")
        else:
            scores = heads[indices]
        kept = keep_heads(scores, budget, num_kv_heads).tolist()
        masks |= {index: tuple(mask) for index, mask in zip(indices, kept)}
    return masks


def _from_file(plan: VisualPlan, index: int, num_heads: int) -> tuple[bool, ...]:
    file = plan.layers[index].heads.file
    masks = load_heads(file)
    if masks.dtype.kind != "b" or masks.shape != (plan.num_layers, num_heads):
        raise PlanError(
            f"plan {plan.name!r}, layer {index}: heads: got {masks.dtype} of shape {masks.shape} in "
            f"{file}, expected bool of shape {(plan.num_layers, num_heads)}"
        )
    return tuple(masks[index].tolist())


def _neurons(plan: VisualPlan, index: int, neurons: np.ndarray | None, heads) -> float | tuple[int, ...]:
    """What the neuron budget of a layer keeps: the most important neurons; a share of first ones for "first"."""
    budget = plan.layers[index].ffn
    if neurons is not None:
        order = np.argsort(-neurons[index], kind="stable")[: budget.count(neurons.shape[1])]
        return tuple(sorted(order.tolist()))
    if isinstance(heads, str) and isinstance(budget.keep, float):
        return budget.keep
    if isinstance(heads, str):
        return tuple(range(budget.keep))
    raise PlanError(
        f"plan {plan.name!r}, layer {index}: ffn: got the budget {{keep: {budget.keep}}} and no neuron importance, "
        "expected calibration= (what vis_sparse.calibrate gives, or its file)"
    )
