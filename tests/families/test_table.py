"""The parity table: every family in every scenario, from one list."""

import pytest
import torch

from .cases import CASES
from .parity import dense_errors, oracle_error
from .scenarios import SCENARIOS

CELLS = [
    pytest.param(case, scenario, id=f"{case.name}-{name}")
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


@every_cell
@pytest.mark.parametrize("semantics", ["exclude", "zero"])
@torch.no_grad()
def test_random_plan_is_the_oracle(case, scenario, semantics):
    assert oracle_error(case, scenario, semantics) <= 1e-5
