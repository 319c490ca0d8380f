"""Head files and budgets: what is read, what is refused, and which heads a budget keeps."""

import pickle
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from vis_sparse.plans.budgets import load_heads, resolve_heads
from vis_sparse.plans.layer_plan import HeadBudget, HeadFile, LayerPlan, PlanError
from vis_sparse.plans.plan import VisualPlan

MASKS = np.array([[1, 0, 1, 0], [0, 0, 1, 1]], dtype=bool)
BUDGETS = VisualPlan((LayerPlan(heads=HeadBudget(0.5)), LayerPlan(heads=HeadBudget(1))), name="budgets")


def kept(plan):
    return [[index for index, active in enumerate(layer.heads) if active] for layer in plan.layers]


def test_files_of_both_kinds(tmp_path):
    np.save(tmp_path / "a.npy", MASKS)
    np.save(tmp_path / "bytes.npy", MASKS.astype(np.uint8))
    scores = np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4)
    save_file({"heads": scores}, tmp_path / "b.safetensors")
    assert (load_heads(tmp_path / "a.npy") == MASKS).all()
    assert load_heads(tmp_path / "bytes.npy").dtype == bool
    assert (load_heads(str(tmp_path / "b.safetensors")) == scores).all()


class Planted:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickled_npy_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "ran"
    np.save(tmp_path / "a.npy", np.array([[Planted(trace)]], dtype=object), allow_pickle=True)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Planted(trace)))
    for name in ("a.npy", "bare.npy"):
        with pytest.raises(PlanError, match="expected a .npy array"):
            load_heads(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(4, dtype=bool), "heads: got bool of shape (4,), expected bool masks or float scores (layers, heads)"),
        (np.ones((2, 4), dtype=np.int64), "heads: got int64 of shape (2, 4), expected bool masks or float scores"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(PlanError, match=re.escape(message)):
        load_heads(tmp_path / "a.npy")


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(PlanError, match="expected an existing .npy or .safetensors file"):
        load_heads(tmp_path / "none.npy")
    save_file({"scores": MASKS}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("no")
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(PlanError, match="expected a .npy array or a .safetensors tensor 'heads'"):
            load_heads(tmp_path / name)


def test_a_budget_without_scores_is_refused_and_says_what_to_give():
    message = "plan 'budgets', layer 0: heads: got the budget {keep: 0.5} and no head scores, expected heads="
    with pytest.raises(PlanError, match=f"^{re.escape(message)}"):
        resolve_heads(BUDGETS, 4, 4)


def test_a_plan_without_budgets_needs_no_scores():
    plan = VisualPlan((LayerPlan(), LayerPlan(heads=(True, False, True, False))))
    resolved = resolve_heads(plan, 4, 4)
    assert resolved == plan


def test_first_keeps_the_first_heads():
    assert kept(resolve_heads(BUDGETS, 4, 4, "first")) == [[0, 1], [0]]


def test_scores_keep_the_highest_and_ties_go_to_the_lower_head(tmp_path):
    scores = np.array([[0.1, 0.4, 0.2, 0.3], [0.5, 0.5, 0.1, 0.5]])
    assert kept(resolve_heads(BUDGETS, 4, 4, scores)) == [[1, 3], [0]]
    save_file({"heads": scores}, tmp_path / "scores.safetensors")
    assert kept(resolve_heads(BUDGETS, 4, 4, tmp_path / "scores.safetensors")) == [[1, 3], [0]]


def test_a_tie_of_many_heads_goes_to_the_first_of_them():
    plan = VisualPlan((LayerPlan(heads=HeadBudget(5)),))
    scores = np.tile([0.5, 1.0, 0.25], 64)[None]
    assert kept(resolve_heads(plan, 192, 192, scores)) == [[1, 4, 7, 10, 13]]


def test_scores_leave_layers_without_a_budget_alone():
    plan = VisualPlan((LayerPlan(), LayerPlan(heads=HeadBudget(1))))
    resolved = resolve_heads(plan, 4, 4, np.eye(4)[:2])
    assert resolved.layers[0].heads is None
    assert resolved.layers[1].heads == (False, True, False, False)


def test_masks_replace_the_plans_own():
    assert kept(resolve_heads(BUDGETS, 4, 4, MASKS)) == [[0, 2], [2, 3]]


def test_a_tensor_is_taken_like_an_array():
    import torch

    assert kept(resolve_heads(BUDGETS, 4, 4, torch.from_numpy(MASKS))) == [[0, 2], [2, 3]]


def test_a_file_named_in_the_plan(tmp_path):
    path = str(tmp_path / "masks.npy")
    plan = VisualPlan((LayerPlan(heads=HeadFile(path)), LayerPlan(heads=HeadFile(path))), name="filed")
    np.save(path, MASKS)
    assert kept(resolve_heads(plan, 4, 4)) == [[0, 2], [2, 3]]
    np.save(path, MASKS[:, :3])
    with pytest.raises(PlanError, match=re.escape("plan 'filed', layer 0: heads: got bool of shape (2, 3)")):
        resolve_heads(plan, 4, 4)
    np.save(path, MASKS.astype(np.float32))
    with pytest.raises(PlanError, match=re.escape("got float32 of shape (2, 4)")):
        resolve_heads(plan, 4, 4)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(PlanError, match=re.escape("heads: got shape (2, 3), expected (layers, heads) = (2, 4)")):
        resolve_heads(BUDGETS, 4, 4, np.zeros((2, 3)))


def test_a_budget_above_the_model_is_refused():
    plan = VisualPlan((LayerPlan(heads=HeadBudget(5)),))
    with pytest.raises(PlanError, match="heads.keep: got 5, expected at most the model's 4 heads"):
        resolve_heads(plan, 4, 4, "first")
