"""The parity table: every family in every scenario, from one list."""

import pytest
import torch
from transformers import GenerationMixin

import vis_sparse
from vis_sparse.eval.launches import Launches

from ..models import random_plan
from .cases import CASES
from .parity import dense_errors, model_of, oracle_error
from .scenarios import SCENARIOS, make_request

_FAST = ("Llava", "Qwen2VL", "InternVL (Qwen2)")
CELLS = [
    pytest.param(
        case, scenario, id=f"{case.name}-{name}", marks=[pytest.mark.slow] if case.name not in _FAST else []
    )
    for case in CASES
    for name, scenario in SCENARIOS.items()
    if case.video or not scenario.has_video
]
every_cell = pytest.mark.parametrize("case,scenario", CELLS)


@every_cell
@torch.no_grad()
def test_dense_plan_is_the_unpatched_model(case, scenario):
    error, same_tokens = dense_errors(case, scenario)
    assert error <= 1e-4
    assert same_tokens


def skip_disordered_tiles(case, scenario):
    """Older `generate` repeats tiles for beams one by one, so that a sample with several has them in another order. It
    does so for an unpatched model too: the dense plan is equal to that, the oracle is not."""
    in_order = hasattr(GenerationMixin, "_supports_mm_encoder_outputs")
    if scenario.run == "beams" and "InternVL" in case.name and not in_order:
        pytest.skip("this transformers mixes up the tiles of a sample under beams")


@every_cell
@pytest.mark.parametrize("semantics", ["exclude", "zero"])
@torch.no_grad()
def test_random_plan_is_the_oracle(case, scenario, semantics):
    skip_disordered_tiles(case, scenario)
    assert oracle_error(case, scenario, semantics) <= 1e-5


@every_cell
@torch.no_grad()
def test_plan_under_which_tokens_leave_is_the_oracle(case, scenario):
    skip_disordered_tiles(case, scenario)
    assert oracle_error(case, scenario, drops=True) <= 1e-5


every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@every_case
@torch.no_grad()
def test_unpatch_is_exact(case):
    model = case.build(torch.float32)
    request = make_request(case, SCENARIOS["mixed batch"], torch.float32)
    before, attributes = model(**request.inputs).logits, [set(vars(module)) for module in model.modules()]
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    vis_sparse.patch(model, random_plan(1))
    assert not torch.equal(model(**request.inputs).logits, before), "the plan does something"
    vis_sparse.unpatch(model)
    assert torch.equal(model(**request.inputs).logits, before)
    assert [set(vars(module)) for module in model.modules()] == attributes
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name][0] and torch.equal(tensor, state[name][1]), name


@every_case
@torch.no_grad()
def test_text_only_dispatches_what_the_unpatched_model_does(case):
    model = model_of(case, torch.float32, "patched")
    inputs = make_request(case, SCENARIOS["no image"], torch.float32).inputs

    def dispatched():
        with Launches() as counted:
            prefill = model(**inputs, use_cache=True)
            model(input_ids=inputs["input_ids"][:, -1:], past_key_values=prefill.past_key_values)
        return counted.ops, counted.views

    expected = dispatched()
    with vis_sparse.patched(model, random_plan(1)):
        assert dispatched() == expected
