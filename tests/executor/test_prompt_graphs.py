"""Prompts as recordings: the logits of eager ones, whatever text stands around the images, and one recording for all.

As in `test_step_graphs`, recordings run as they were traced.
"""

import copy

import pytest
import torch

import vis_sparse
from vis_sparse.executor.recorded import bucket

from ..marks import slow_but
from ..models import IMAGE, extended, make_batch, make_model, random_plan, run
from .test_step_graphs import a_hook, graphs, other_data, pair, scaled_in_place  # noqa: F401

# texts of one bucket around as many images; the rows of the second image of "several" are apart
TEXTS = {
    "one": [[(5, IMAGE, 4)], [(9, IMAGE, 6)], [(2, IMAGE, 3)], [(5, IMAGE, 4)]],
    "ragged": [
        [(5, IMAGE, 4), (2, IMAGE, 3)],
        [(3, IMAGE, 9), (2, IMAGE, 1)],
        [(1, IMAGE, 2), (7, IMAGE, 9)],
        [(5, IMAGE, 4), (2, IMAGE, 3)],
    ],
    "several": [
        [(5, IMAGE, 2, IMAGE, 4), (7, IMAGE, 3)],
        [(3, IMAGE, 1, IMAGE, 9), (2, IMAGE, 1)],
        [(1, IMAGE, 7, IMAGE, 2), (7, IMAGE, 9)],
        [(5, IMAGE, 2, IMAGE, 4), (7, IMAGE, 3)],
    ],
}
CASES = [
    (text, padding, seed, semantics)
    for text in TEXTS
    for padding in ("left", "right")
    for seed, semantics in ((700, "exclude"), (701, "zero"), (702, "exclude"), (703, "exclude"))
]
FAST = [CASES[12]]


def test_buckets_are_few_and_close():
    sizes = [bucket(number) for number in range(1, 5000)]
    assert all(number <= size <= max(16, number * 1.25 + 16) for number, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 50


@pytest.mark.parametrize("case", slow_but(FAST, CASES), ids=lambda case: "-".join(map(str, case)))
@torch.no_grad()
def test_prompts_are_the_eager_ones(case, graphs):  # noqa: F811
    """And so are steps behind them, which read what the recording left in the cache."""
    text, padding, seed, semantics = case
    eager, fast = pair(random_plan(seed, semantics))
    for number, samples in enumerate(TEXTS[text]):
        batch = make_batch(eager, samples, padding, seed=number)
        longer = extended(eager, batch, 1)
        expected, given = (run(model, longer, [batch.length])[0] for model in (eager, fast))
        torch.testing.assert_close(given, expected)
    # two texts run first, one is recorded; steps have a recording of their own, for as many slots
    assert len(graphs) == 2


@pytest.mark.parametrize("change", slow_but([other_data], [scaled_in_place, other_data, a_hook]))
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:vis_sparse. graphs=True")
def test_changes_between_prompts_are_noticed(change, graphs):  # noqa: F811
    eager, fast = pair(random_plan(704))
    for number, samples in enumerate(TEXTS["ragged"] * 2):
        if number == 4:
            change(eager)
            change(fast)
        batch = make_batch(eager, samples, seed=number)
        torch.testing.assert_close(fast(**batch.by_ids()).logits, eager(**batch.by_ids()).logits)
    assert graphs


@pytest.mark.slow
@torch.no_grad()
def test_layouts_and_plans_have_recordings_of_their_own(graphs):  # noqa: F811
    plans = {"a": random_plan(705), "b": random_plan(706)}
    eager, fast = pair(plans)
    for number, samples in enumerate([*TEXTS["one"][:3], *TEXTS["ragged"][:3]] * 2):
        batch, name = make_batch(eager, samples, seed=number), "a" if number % 2 else "b"
        found = []
        for model in (eager, fast):
            with vis_sparse.use_plan(model, name):
                found.append(model(**batch.by_ids(), use_cache=False).logits)
        torch.testing.assert_close(*found)
    assert len(graphs) == 4


@pytest.mark.slow
@torch.no_grad()
def test_recordings_are_kept_within_a_bound(graphs):  # noqa: F811
    _, fast = pair(random_plan(707))
    state = fast.model.language_model._vis_sparse
    ((_, prompts),) = state.graphs.values()
    prompts.limit = 0
    for samples in ([(5, IMAGE, 4)], [(5, IMAGE, 4)] * 2, [(5, IMAGE, 4)]):
        for seed in (1, 2):
            fast(**make_batch(fast, samples, seed=seed).by_ids())
    assert len(prompts._graphs) == 1 and len(graphs) == 3
    vis_sparse.unpatch(fast)
    assert not prompts._graphs


@pytest.mark.slow
@torch.no_grad()
def test_a_copy_of_the_model_records_for_itself(graphs):  # noqa: F811
    _, fast = pair(random_plan(708))
    batch = make_batch(fast, [(5, IMAGE, 4)])
    for _ in range(2):
        run(fast, extended(fast, batch, 1), [batch.length])
    twin = copy.deepcopy(fast)
    twin.model.language_model.layers[0].mlp.up_proj.weight.zero_()
    eager = vis_sparse.patch(make_model("llama-gqa"), random_plan(708))
    eager.load_state_dict(twin.state_dict())
    longer = extended(fast, batch, 1)
    torch.testing.assert_close(run(twin, longer, [batch.length])[0], run(eager, longer, [batch.length])[0])
