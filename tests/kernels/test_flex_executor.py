"""The executor on FlexAttention."""

import pytest
import torch

from ..executor.test_parity import SCENARIOS
from ..marks import slow_but
from .executor import largest_difference


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
@pytest.mark.parametrize("scenario", slow_but(["left-chunks"], SCENARIOS))
@torch.no_grad()
def test_random_plan_is_the_oracle(scenario, semantics):
    assert largest_difference("flex", scenario, "llama-gqa", semantics, torch.float64) <= 1e-5
