"""Which heads are active: masks and scores from files, and budgets resolved to masks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from .plan import HeadBudget, HeadFile, PlanError, VisualPlan, mask_plan


def load_heads(path: str | Path) -> np.ndarray:
    """A (layers, heads) array: bool masks (True = active) or float scores (higher = more active).

    `.npy` holds the array itself (the official masks' format); `.safetensors` holds it as tensor `heads`. Nothing is
    unpickled. Raises PlanError if the file is missing or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise PlanError(f"heads: got {str(path)!r}, expected an existing .npy or .safetensors file")
    try:
        array = np.load(path, allow_pickle=False) if path.suffix == ".npy" else load_file(path)["heads"]
    except Exception as error:
        raise PlanError(f"heads: {path}: expected a .npy array or a .safetensors tensor 'heads' ({error})") from None
    return _checked(array)


def _checked(array) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype == np.uint8:
        array = array.astype(bool)
    if array.ndim != 2 or array.dtype.kind not in "bf":
        raise PlanError(
            f"heads: got {array.dtype} of shape {array.shape}, expected bool masks or float scores (layers, heads)"
        )
    return array


def resolve_heads(plan: VisualPlan, num_heads: int, num_kv_heads: int, heads=None) -> VisualPlan:
    """`plan` with every `HeadBudget` and `HeadFile` turned into a mask.

    heads: None; a file for `load_heads`; a (layers, heads) array of masks, which replaces the plan's own, or of
    scores, from which budgets keep the highest; or "first", for which budgets keep the first heads (for counting and
    for random weights: it says nothing about trained ones). Raises PlanError if a budget is left without scores.
    """
    if isinstance(heads, str | Path) and heads != "first":
        heads = load_heads(heads)
    if heads is not None and not isinstance(heads, str):
        heads = _checked(heads.cpu().numpy() if hasattr(heads, "cpu") else heads)
        expected = (plan.num_layers, num_heads)
        if heads.shape != expected:
            raise PlanError(f"heads: got shape {heads.shape}, expected (layers, heads) = {expected}")
        if heads.dtype.kind == "b":
            return mask_plan(plan, heads.tolist())
    layers = []
    for index, layer in enumerate(plan.layers):
        if isinstance(layer.heads, HeadFile):
            masks = load_heads(layer.heads.file)
            if masks.dtype.kind != "b" or masks.shape != (plan.num_layers, num_heads):
                raise PlanError(
                    f"plan {plan.name!r}, layer {index}: heads: got {masks.dtype} of shape {masks.shape} in "
                    f"{layer.heads.file}, expected bool of shape {(plan.num_layers, num_heads)}"
                )
            layer = dataclasses.replace(layer, heads=tuple(masks[index].tolist()))
        elif isinstance(layer.heads, HeadBudget):
            if heads is None:
                raise PlanError(
                    f"plan {plan.name!r}, layer {index}: heads: got the budget {{keep: {layer.heads.keep}}} and no "
                    "head scores, expected heads= (a file or array of scores or masks; 'first' for random weights)"
                )
            kept = layer.heads.count(num_heads)
            order = range(num_heads) if isinstance(heads, str) else np.argsort(-heads[index], kind="stable")
            chosen = {int(head) for head in list(order)[:kept]}
            layer = dataclasses.replace(layer, heads=tuple(head in chosen for head in range(num_heads)))
        layers.append(layer)
    return plan.replace(layers=tuple(layers))
