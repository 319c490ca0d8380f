"""Tokens before the decoder, as data: what is refused, what a file and a checkpoint hold."""

import re

import pytest

from vis_sparse import LayerPlan, PlanError, TokenBudget, TokensBefore, VisualPlan
from vis_sparse.plans.carried import read_block, to_block
from vis_sparse.plans.plan import read_recipe

EVERY = [
    TokensBefore("duplicate"),
    TokensBefore("duplicate", tolerance=0.25),
    *(TokensBefore(by, 0.3) for by in ("change", "received", "relevance", "stride")),
]


def planned(before, *layers) -> VisualPlan:
    return VisualPlan(layers or (LayerPlan(),) * 3, "planned", before=before)


@pytest.mark.parametrize("before", EVERY, ids=str)
def test_files_and_checkpoints_hold_it(before):
    plan = planned(before)
    assert VisualPlan.from_yaml(plan.to_yaml()) == plan
    assert read_block(to_block({"planned": plan}, 4, 8)) == {"planned": plan}
    assert plan.as_recipe().resolve() == plan
    assert not plan.is_dense
    recipe = read_recipe(f"name: planned\nbefore: {before.to_data()}\nlayers: {{50%-: off}}\n")
    assert recipe.resolve(4).before == before == recipe.whole_first(1).resolve(4).before


def test_a_share_of_one_is_all():
    assert planned(TokensBefore("received", 1)).is_dense
    assert "before" not in planned(TokensBefore("received", 1)).to_yaml()
    assert read_recipe("name: planned\nbefore: all\n").before is None


def test_counts_are_a_function_of_tokens_and_share():
    budget = TokensBefore("received", 0.3)
    assert [budget.count(tokens) for tokens in (0, 1, 3, 4, 10, 576)] == [0, 1, 1, 1, 3, 172]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokensBefore("attention", 0.5), "before.by: got 'attention', expected one of duplicate, change, rec"),
        (lambda: TokensBefore("received"), "before.keep: got None by received, expected a share in (0, 1]"),
        (lambda: TokensBefore("received", 0), "before.keep: got 0 by received, expected a share in (0, 1]"),
        (lambda: TokensBefore("stride", True), "before.keep: got True by stride, expected a share in (0, 1]"),
        (lambda: TokensBefore("duplicate", 0.5), "before.keep: got 0.5 by duplicate, expected none (pixels decide)"),
        (lambda: TokensBefore("duplicate", tolerance=-1), "before.tolerance: got -1, expected a number >= 0"),
        (lambda: TokensBefore("change", 0.5, 1), "before.tolerance: got 1.0 by change, expected none (by duplicate al"),
        (lambda: planned("half"), "before: got 'half', expected {keep: share, by: order} or {by: duplicate}"),
        (lambda: read_recipe("before: 0.5\nname: x\n"), "before: got 0.5, expected 'all' or the keys by, keep, toler"),
        (lambda: read_recipe("before: {keep: 0.5}\n"), "before: by is missing"),
        (
            lambda: read_recipe("before: {by: stride, kep: 1}\n"),
            "before: got unknown key 'kep', expected one of by, keep, tolerance; did you mean 'keep'?",
        ),
        (
            lambda: planned(EVERY[2]).replace(semantics="zero"),
            "before: got {'keep': 0.3, 'by': 'change'} under semantics 'zero', expected 'exclude'",
        ),
        (
            lambda: planned(EVERY[2], LayerPlan(tokens=TokenBudget(0.5, "stride")), LayerPlan()),
            "layer 0: tokens.by: got stride after tokens left before the decoder, expected whole grids",
        ),
        (
            lambda: VisualPlan.dense(2).replace(tower=planned(EVERY[0])),
            "without a tower of its own or tokens that leave before it",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        make()
