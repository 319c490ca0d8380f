"""Which tokens stay, where order, grids and calls make it subtle."""

import numpy as np
import pytest
import torch

import vis_sparse
from vis_sparse.executor.tokens import choose
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.layout.packing import visual_coordinates
from vis_sparse.plans.layer_plan import LayerPlan, TokenBudget
from vis_sparse.plans.plan import VisualPlan

from .. import oracle
from ..models import IMAGE, LAYERS, make_batch, make_model, run


def test_of_many_equal_scores_the_first_stay():
    visual = visual_coordinates(VisualLayout.from_grids([[(0, (1, 20, 20))]]))
    scores = np.random.default_rng(0).integers(0, 3, 400).astype(float)
    best = sorted(range(400), key=lambda i: (-scores[i], i))[:200]
    assert choose(TokenBudget(0.5, "norm"), 0, visual, scores).tolist() == sorted(best)


@pytest.mark.parametrize("keep", [0.2, 0.34, 0.5])
def test_grids_of_one_height_have_their_own_sub_grids(keep):
    budget, grids = TokenBudget(keep, "stride"), ((1, 2, 3), (1, 2, 8), (1, 2, 5))

    def kept(*grids) -> list[int]:
        starts = np.cumsum([0, *(np.prod(grid) for grid in grids)])
        layout = VisualLayout.from_grids([list(zip(map(int, starts), grids))])
        return choose(budget, 0, visual_coordinates(layout), None).tolist()

    first, second, third = (kept(grid) for grid in grids)
    assert kept(*grids) == [*first, *(6 + i for i in second), *(22 + i for i in third)]


@torch.no_grad()
def test_prompts_that_came_in_two_calls():
    """Where the prompt ends is counted from the start of the sequence, in a later call too."""
    model = vis_sparse.patch(make_model("llama-gqa"), VisualPlan.fastv(LAYERS, 1, 0.3))
    batch = make_batch(model, [(8, IMAGE, 12)])
    with vis_sparse.use_prompt(model, 8 + 16 + 3):
        expected, _ = run(model, batch)
        logits, _ = run(model, batch, cuts=[7])
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(run(model, batch)[0], expected), "the row that ranks shows"


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_heads_that_read_no_visual_token_give_it_nothing(seed):
    """Half of each group of heads that share keys reads: the scores are the mean over what all heads give."""
    budget = TokenBudget(0.3)
    plan = VisualPlan((LayerPlan(heads=(True, False) * 4, tokens=budget), *[LayerPlan()] * (LAYERS - 1)))
    reference = make_model("llama-gqa", seed)
    batch = make_batch(reference, [(5, IMAGE, 4), (2, IMAGE, 3)], seed=seed)
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask)
    logits, _ = run(vis_sparse.patch(make_model("llama-gqa", seed), plan), batch)
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    assert (logits - expected)[rows].abs().max() <= 1e-5 * expected[rows].abs().max()
