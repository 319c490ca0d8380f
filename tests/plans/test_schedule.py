"""The schedule: which visual rows, keys and values each layer has to compute."""

import pytest

from vis_sparse.plans.budgets import resolve_heads
from vis_sparse.plans.files import as_plan
from vis_sparse.plans.layer_plan import HeadBudget, LayerPlan, Neighborhood, PlanError
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.schedule import schedule

HEADS, KV_HEADS, NEURONS = 8, 8, 32
ALL = tuple(range(8))


def work_of(plan, kv_heads=KV_HEADS):
    plan = resolve_heads(as_plan(plan, 32), HEADS, kv_heads, "first")
    return schedule(plan, HEADS, kv_heads, NEURONS)


def layers_where(work, condition):
    return [index for index, item in enumerate(work) if condition(item)]


def test_dense_keeps_every_row_to_the_end():
    for item in work_of("dense"):
        assert (item.query_heads, item.key_heads, item.value_heads) == (ALL, ALL, ALL)
        assert (item.neurons, item.reads, item.stores, item.updates) == (NEURONS, True, True, True)


def test_an_almost_dense_plan_does_not_update_rows_in_the_last_layer():
    near = (LayerPlan(attention=Neighborhood(1)), *[LayerPlan()] * 3)
    last = schedule(VisualPlan(near), HEADS, KV_HEADS, NEURONS)[-1]
    assert (last.query_heads, last.neurons, last.updates) == ((), 0, False)
    assert (last.key_heads, last.reads, last.stores) == (ALL, True, True)


def test_vtw_updates_rows_up_to_the_layer_before_the_last_that_reads_them():
    work = work_of("vtw")
    assert layers_where(work, lambda item: item.updates) == list(range(15))
    assert layers_where(work, lambda item: item.reads) == list(range(16))
    assert layers_where(work, lambda item: item.key_heads) == list(range(16))
    assert layers_where(work, lambda item: item.stores) == list(range(16))


def test_vica_computes_keys_in_the_layers_that_read_and_nothing_else():
    work = work_of("vica")
    reading = [0, 1, 7, 8, 9, 10, 11, 14]
    assert layers_where(work, lambda item: item.updates) == []
    assert layers_where(work, lambda item: item.key_heads == ALL) == reading
    assert layers_where(work, lambda item: item.key_heads) == reading
    assert layers_where(work, lambda item: item.stores) == reading


def test_yopo_12():
    work = work_of("yopo-12")
    assert [len(item.query_heads) for item in work] == [8] * 2 + [1] * 13 + [0] * 17
    assert [len(item.key_heads) for item in work] == [8] * 2 + [1] * 14 + [0] * 16
    assert [item.neurons for item in work] == [8] * 15 + [0] * 17


def test_a_frozen_layer_is_read_and_changes_nothing():
    work = work_of("shortv")
    assert layers_where(work, lambda item: item.updates) == list(range(13))
    assert all(item.reads and item.stores and item.key_heads == ALL for item in work)


def test_skipped_attention_leaves_the_ffn_and_what_text_reads():
    item = work_of("vskip")[20]
    assert (item.query_heads, item.neurons, item.key_heads, item.reads) == ((), NEURONS, ALL, True)


def test_rows_that_nobody_reads_later_are_dead_however_much_the_plan_asks():
    plan = VisualPlan((LayerPlan(), LayerPlan(text_reads=False), LayerPlan(text_reads=False, ffn=0.5)))
    first, *rest = schedule(plan, HEADS, KV_HEADS, NEURONS)
    assert (first.updates, first.attention, first.key_heads) == (False, "none", ALL)
    for item in rest:
        assert item.attention == "none"
        assert (item.updates, item.key_heads, item.reads, item.stores) == (False, (), False, False)


def test_an_unread_layer_between_reads_still_updates_rows():
    silent = LayerPlan(text_reads=False, attention=Neighborhood(1))
    item = schedule(VisualPlan((LayerPlan(), silent, LayerPlan())), HEADS, KV_HEADS, NEURONS)[1]
    assert (item.updates, item.query_heads, item.key_heads, item.reads) == (True, ALL, ALL, False)
    assert not item.stores  # neighbours lie in the segment itself, which comes in one call
    full = LayerPlan(text_reads=False)
    item = schedule(VisualPlan((LayerPlan(), full, LayerPlan())), HEADS, KV_HEADS, NEURONS)[1]
    assert item.stores and not item.reads  # a later segment reads these keys


def test_no_active_head_means_no_read():
    none = LayerPlan(heads=(False,) * HEADS)
    first, second = schedule(VisualPlan((LayerPlan(), none)), HEADS, KV_HEADS, NEURONS)
    assert (second.reads, second.key_heads, second.stores) == (False, (), False)
    assert not first.updates


def test_a_kv_head_is_computed_if_one_of_its_query_heads_is_active():
    mask = tuple(head in (1, 6) for head in range(HEADS))
    item = schedule(VisualPlan((LayerPlan(heads=mask), LayerPlan())), HEADS, 2, NEURONS)[0]
    assert (item.query_heads, item.key_heads) == ((1, 6), (0, 1))
    mask = tuple(head in (5, 6) for head in range(HEADS))
    item = schedule(VisualPlan((LayerPlan(heads=mask), LayerPlan())), HEADS, 2, NEURONS)[0]
    assert (item.query_heads, item.key_heads) == ((5, 6), (1,))


def test_zero_semantics_stops_nothing_and_keeps_every_key():
    plan = as_plan("yopo-12", 32).replace(semantics="zero")
    work = work_of(plan)
    assert all(item.key_heads == ALL and item.reads and item.stores for item in work)
    assert [len(item.value_heads) for item in work] == [8] * 2 + [1] * 14 + [0] * 16

    near = Neighborhood(2, "both")
    cut = VisualPlan.yopo(4, layer_cut=2, head_mask=[[True] * 4 + [False] * 4] * 4, ffn_ratio=2, semantics="zero")
    for index, item in enumerate(schedule(cut, HEADS, KV_HEADS, NEURONS)):
        assert (item.query_heads, item.neurons, item.attention) == ((0, 1, 2, 3), 16, near)
        assert item.value_heads == ((0, 1, 2, 3) if index < 2 else ())


def test_kept_neurons_are_handed_on():
    plan = VisualPlan((LayerPlan(ffn=(1, 5, 31)), LayerPlan()))
    assert schedule(plan, HEADS, KV_HEADS, NEURONS)[0].neurons == (1, 5, 31)


def test_budgets_must_be_resolved_first():
    plan = VisualPlan((LayerPlan(heads=HeadBudget(2)),))
    with pytest.raises(PlanError, match="expected a mask"):
        schedule(plan, HEADS, KV_HEADS, NEURONS)


def test_a_plan_that_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="layer 0: heads: got a mask of 2, expected the model's 8 heads"):
        schedule(VisualPlan((LayerPlan(heads=(True, False)),)), HEADS, KV_HEADS, NEURONS)
