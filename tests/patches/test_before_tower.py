"""What vision encoders do for tokens before the decoder: attention received, and patches that leave before them."""

import numpy as np
import pytest
import torch

from vis_sparse.executor.before_scores import distinct, token_patches
from vis_sparse.executor.tower import TowerExecutor, TowerRun
from vis_sparse.executor.tower_tables import TowerTables
from vis_sparse.kernels import get_backend
from vis_sparse.patches.tower import blocks_of, read_tower
from vis_sparse.plans.layer_plan import LayerPlan
from vis_sparse.plans.plan import VisualPlan

from .. import tower_oracle
from ..marks import slow_but
from ..towers import CASES, DEPTH, random_plan
from .test_tower import check, first_call

BACKEND = get_backend("torch")


def started(case, model, plan, last=DEPTH, only=None, scored=False):
    executor = TowerExecutor(read_tower(case.kind, model), plan, BACKEND)
    executor.kept_cuts.refresh()
    tables = TowerTables.of(case.kind.rows(model, case.call()), torch.device("cpu"))
    return TowerRun(executor, tables if only is None else tables.only(only), last, scored)


def oracle_of(case, model, plan, hidden, rotary, alive=None):
    places, windows, windowed = case.places(model)
    blocks = blocks_of(case.kind, model)
    flat = hidden.flatten(0, -2)
    return tower_oracle.states(blocks, case.names, plan.layers, flat, places, windows, rotary, windowed, alive)


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_attention_received_in_the_last_layer_that_runs(name, last):
    """Whatever the plan lets patches read there: the whole layer's, of those that are left."""
    case = CASES[name]
    model = case.model()
    hidden, rotary = first_call(case, model)
    places, windows, windowed = case.places(model)
    for plan in (VisualPlan.dense(DEPTH), random_plan(11, tokens=False)):
        plan = plan.replace(layers=tuple(LayerPlan.off() if i == 2 else each for i, each in enumerate(plan.layers)))
        run, x = started(case, model, plan, last, scored=True), hidden
        for index in range(DEPTH):
            x = run.layer(index, x, rotary)
        x = oracle_of(case, model, plan, hidden, rotary)[last]
        parts = windows if windowed and windowed[last] else places
        alive = torch.ones(len(x), dtype=torch.bool)
        block = blocks_of(case.kind, model)[last]
        expected = tower_oracle.received(block, case.names, x, parts, alive, rotary)
        torch.testing.assert_close(run.received, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", slow_but([0], range(4)))
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_patches_that_leave_before_the_first_layer(name, seed):
    """The others are the oracle's without them, under any section; those keep what they had."""
    case = CASES[name]
    model = case.model()
    hidden, rotary = first_call(case, model)
    rows = case.kind.rows(model, case.call())
    merge = 2 if case.is_packed else 1
    patches = token_patches(rows, merge)
    stays = np.random.default_rng(seed).random(len(patches)) < 0.5
    stays[[0, *np.flatnonzero(np.diff(rows.sequence[patches[:, 0]])) + 1]] = True  # one at least of every image
    alive = torch.ones(len(rows.y), dtype=torch.bool)
    alive[patches[~stays].ravel()] = False
    for plan in (VisualPlan.dense(DEPTH), random_plan(20 + seed, tokens=False)):
        run, found = started(case, model, plan, only=patches[stays].ravel(), scored=True), [hidden]
        for index in range(DEPTH):
            found.append(run.layer(index, found[-1], rotary))
        check(found, oracle_of(case, model, plan, hidden, rotary, alive))
        assert torch.equal(found[-1].flatten(0, -2)[~alive], hidden.flatten(0, -2)[~alive])
        assert (run.received[~alive] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_pixels_of_tokens_are_those_of_their_patches(name):
    """A picture that is flat but for one value: its token stays, and the ones to the right of it and below it."""
    case = CASES[name]
    model = case.model()
    call = case.call()
    rows, merge = case.kind.rows(model, call), 2 if case.is_packed else 1
    if case.is_packed:
        call["hidden_states"][:] = 1.0
        call["hidden_states"][9, 3] = 2.0  # of the first grid's 2 x 3 tokens the third, which lies on the rim
        changed, inside = {2}, {5}
    else:
        call["pixel_values"][:] = 1.0
        call["pixel_values"][0, 1, 5, 9] = 2.0  # of 3 x 5 patches the second row's third
        changed, inside = {7}, {7, 8, 12}
    patches = token_patches(rows, merge)
    pixels = case.kind.pixels(model, call, merge)
    assert len(pixels) == len(patches)
    assert set(np.flatnonzero((pixels != 1).any(1).numpy())) == changed
    first = patches[:, 0]
    rim = (rows.y[first] < merge) | (rows.x[first] < merge)
    assert set(np.flatnonzero(distinct(pixels, rows, patches, merge, 0.0) & ~rim)) == inside
