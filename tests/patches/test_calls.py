"""A call is its own: threads, generators, interrupts and exceptions on one patched model, and a plan a call."""

import asyncio
import contextlib
import copy
import io
import threading
import time

import pytest
import torch
from transformers import DynamicCache

import vis_sparse
from vis_sparse.executor.kept_calls import KeptCalls
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.patches import unpatched
from vis_sparse.plans.plan import VisualPlan

from ..marks import slow_but
from ..models import IMAGE, LAYERS, extended, make_batch, make_model, random_plan, run

EXACT = dict(atol=1e-10, rtol=1e-10)
PLANS = {"fast": random_plan(3), "exact": VisualPlan.dense(LAYERS)}


@pytest.fixture
def model():
    return vis_sparse.patch(make_model(), PLANS["fast"])


def requests(model) -> list:
    """Batches whose layouts have nothing in common, one of text alone."""
    samples = ([(3, IMAGE, 4)], [(6, IMAGE, 4)], [(9,)], [(2, IMAGE, 2, IMAGE, 3)], [(5, IMAGE, 2), (1, IMAGE, 9)])
    return [make_batch(model, each, seed=seed) for seed, each in enumerate(samples)]


@pytest.mark.parametrize("by", slow_but(["ids"], ["ids", "embeds"]))
def test_threads_on_one_model(model, by):
    batches = requests(model)
    with torch.no_grad():
        expected = [run(model, batch, by=by)[0] for batch in batches]
    wrong, end = [], time.monotonic() + 4

    @torch.no_grad()
    def serve(first: int):
        number = first
        while time.monotonic() < end and not wrong:
            index = number % len(batches)
            try:
                logits, _ = run(model, batches[index], by=by)
                torch.testing.assert_close(logits, expected[index], **EXACT)
            except Exception as error:
                wrong.append((index, error))
            number += 3

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


@torch.no_grad()
def test_interleaved_generators_keep_their_layouts(model):
    """A generator that holds `use_layout` open while others are advanced, and calls that have no layout at all."""
    first, second, third = make_batch(model, [(3, IMAGE, 8)]), make_batch(model, [(7, IMAGE, 4)], seed=2), None
    third = make_batch(model, [(4, IMAGE, 7)], seed=3)

    def stream(batch):
        with vis_sparse.use_layout(model, batch.layout):
            for _ in range(2):
                yield model(**batch.by_embeds()).logits

    expected = [run(model, batch)[0] for batch in (first, second, third)]
    one, two = stream(first), stream(second)
    torch.testing.assert_close(next(one), expected[0], **EXACT)
    torch.testing.assert_close(next(two), expected[1], **EXACT)
    torch.testing.assert_close(model(**third.by_ids()).logits, expected[2], **EXACT)
    with pytest.warns(UserWarning, match="inputs_embeds without input_ids"):
        blind = model(**third.by_embeds()).logits
    with unpatched(model):
        torch.testing.assert_close(blind, model(**third.by_ids()).logits, **EXACT)
    torch.testing.assert_close(next(one), expected[0], **EXACT)
    one.close()
    torch.testing.assert_close(next(two), expected[1], **EXACT)


@torch.no_grad()
def test_layouts_reach_calls_through_context_managers_and_tasks(model):
    batch = make_batch(model, [(3, IMAGE, 8)])
    expected = run(model, batch)[0]

    @contextlib.contextmanager
    def mine():
        with vis_sparse.use_layout(model, batch.layout):
            yield

    with mine():
        torch.testing.assert_close(model(**batch.by_embeds()).logits, expected, **EXACT)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mine())
        torch.testing.assert_close(model(**batch.by_embeds()).logits, expected, **EXACT)

    other = make_batch(model, [(6, IMAGE, 5)], seed=5)

    async def answer(each):
        with vis_sparse.use_layout(model, each.layout):
            await asyncio.sleep(0.01)
            return await asyncio.to_thread(lambda: model(**each.by_embeds()).logits)

    async def both():
        return await asyncio.gather(answer(batch), answer(other))

    with torch.no_grad():
        found = asyncio.run(both())
    torch.testing.assert_close(found[0], expected, **EXACT)
    torch.testing.assert_close(found[1], run(model, other)[0], **EXACT)


class Stop(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises an error at the operation with a number; counts all without one."""

    def __init__(self, at=None, error=KeyboardInterrupt):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@torch.no_grad()
def test_nothing_is_left_behind_an_interrupt(error):
    """At places all over a forward: the next call is right, the text model alone is, and unpatching is exact."""
    model = make_model()
    batch, text = make_batch(model, [(3, IMAGE, 4), (6, IMAGE, 1)]), make_batch(model, [(9,)])
    dense = model(**batch.by_ids()).logits, model(**text.by_ids()).logits
    keys = set(vars(model.model.language_model))
    vis_sparse.patch(model, PLANS["fast"])
    expected = run(model, batch)[0]
    alone = model.model.language_model(inputs_embeds=text.embeds).last_hidden_state
    with Stop() as counting:
        model(**batch.by_ids())
    for at in torch.randint(1, counting.count + 1, (100,), generator=torch.Generator().manual_seed(0)).tolist():
        with pytest.raises(error), Stop(at, error):
            model(**batch.by_ids())
        if at % 5 == 0:  # before another call of the whole model could clean up
            found = model.model.language_model(inputs_embeds=text.embeds).last_hidden_state
            torch.testing.assert_close(found, alone, **EXACT)
        torch.testing.assert_close(run(model, batch)[0], expected, **EXACT)
    vis_sparse.unpatch(model)
    assert set(vars(model.model.language_model)) == keys
    for one, logits in zip((batch, text), dense):
        assert torch.equal(model(**one.by_ids()).logits, logits)


@torch.no_grad()
def test_a_plan_a_call():
    model = make_model()
    batch = make_batch(model, [(3, IMAGE, 4)])
    expected = {}
    for name, plan in PLANS.items():
        with vis_sparse.patched(model, plan):
            expected[name] = run(model, batch)[0], model.generate(**batch.to_generate(), max_new_tokens=6)
    vis_sparse.patch(model, PLANS)
    assert set(vis_sparse.inspect(model)["plans"]) == {"fast", "exact"}
    torch.testing.assert_close(run(model, batch)[0], expected["fast"][0], **EXACT)
    for name in ("exact", "fast"):
        with vis_sparse.use_plan(model, name):
            torch.testing.assert_close(run(model, batch)[0], expected[name][0], **EXACT)
            assert vis_sparse.inspect(model)["plan"] == PLANS[name]
        tokens = model.generate(**batch.to_generate(), max_new_tokens=6, vis_sparse_plan=name)
        assert torch.equal(tokens, expected[name][1])
    assert not torch.allclose(expected["fast"][0], expected["exact"][0])
    torch.testing.assert_close(run(model, batch)[0], expected["fast"][0], **EXACT)


@torch.no_grad()
def test_a_cache_belongs_to_its_plan():
    """Calls go on under the plan of their cache, and refuse one of another plan that is asked for."""
    model = make_model()
    whole = extended(model, make_batch(model, [(3, IMAGE, 4)]), 3)
    with vis_sparse.patched(model, PLANS["exact"]):
        expected = run(model, whole, cuts=[whole.length - 3])[0]
    vis_sparse.patch(model, PLANS)
    prompt = whole.length - 3
    call = dict(attention_mask=whole.attention_mask[:, :prompt], past_key_values=DynamicCache(), use_cache=True)
    with vis_sparse.use_plan(model, "exact"):
        out = model(input_ids=whole.input_ids[:, :prompt], pixel_values=whole.pixel_values, **call)
    rest = dict(input_ids=whole.input_ids[:, prompt:], attention_mask=whole.attention_mask)
    refused = pytest.raises(vis_sparse.PatchError, match="expected one filled under plan 'fast'")
    with vis_sparse.use_plan(model, "fast"), refused:
        model(**rest, past_key_values=out.past_key_values)
    logits = model(**rest, past_key_values=out.past_key_values).logits
    torch.testing.assert_close(logits, expected[:, prompt:], **EXACT)


def test_plans_that_a_model_does_not_have():
    model = make_model()
    with pytest.raises(vis_sparse.PatchError, match="use_plan: got a model that is not patched"):
        vis_sparse.use_plan(model, "fast").__enter__()
    vis_sparse.patch(model, PLANS)
    with pytest.raises(vis_sparse.PatchError, match="got 'quick', expected one of fast, exact"):
        vis_sparse.use_plan(model, "quick").__enter__()
    batch = make_batch(model, [(3, IMAGE, 4)])
    with pytest.raises(vis_sparse.PatchError, match="vis_sparse_plan: got 'quick'"):
        model.generate(**batch.to_generate(), vis_sparse_plan="quick")
    for wrong in ({}, {1: "dense"}):
        with pytest.raises(vis_sparse.PlanError, match="expected a plan, or plans by name"):
            vis_sparse.patch(model, wrong)


@torch.no_grad()
def test_copies_and_pickles_of_a_patched_model():
    """A copy is patched by itself; a file of the whole model loads and is patched."""
    model = vis_sparse.patch(make_model(), PLANS)
    file = io.BytesIO()
    torch.save(model, file)  # before its tower has run: transformers then puts hooks there that no file can hold
    batch = make_batch(model, [(3, IMAGE, 4)])
    expected = run(model, batch)[0]
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        torch.testing.assert_close(run(other, batch)[0], expected, **EXACT)
        other.model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
        assert not torch.allclose(run(other, batch)[0], expected)
        vis_sparse.unpatch(other)
        assert "forward" not in vars(other.model.language_model) and vis_sparse.inspect(other) is None
    torch.testing.assert_close(run(model, batch)[0], expected, **EXACT)


@torch.no_grad()
def test_kept_tables_are_bounded(model):
    """By bytes, the least recently used first; calls under many layouts hold no more, and repeat rightly."""
    text_model = model.model.language_model
    state = text_model._vis_sparse
    layouts = [make_batch(model, [(before, (1, side, side), 2)]) for before in (1, 2, 3) for side in (4, 5, 6)]
    run(model, layouts[0], by="embeds")
    one = state.kept_calls.bytes
    assert one > 0
    state.kept_calls = KeptCalls(limit=4 * one)
    expected = [run(model, batch, by="embeds")[0] for batch in layouts]
    assert 1 < len(state.kept_calls) < len(layouts)
    keys = list(state.kept_calls._calls)
    run(model, layouts[-2], by="embeds")  # used again: the newest now
    assert list(state.kept_calls._calls) == [*(k for k in keys if k != keys[-2]), keys[-2]]
    for batch, logits in zip(layouts, expected):
        torch.testing.assert_close(run(model, batch, by="embeds")[0], logits, **EXACT)
        newest = next(reversed(state.kept_calls._calls.values()))
        others = state.kept_calls.bytes - KeptCalls.bytes.fget(_only(newest))
        assert others <= state.kept_calls.limit


def _only(call) -> KeptCalls:
    kept = KeptCalls()
    kept.keep("only", call)
    return kept


def test_layouts_of_other_batches_are_refused(model):
    batch = make_batch(model, [(3, IMAGE, 4), (2, IMAGE, 5)])
    with (
        vis_sparse.use_layout(model, VisualLayout.from_grids([[(3, IMAGE)]] * 3)),
        pytest.raises(vis_sparse.LayoutError, match="expected a multiple of 3"),
    ):
        model(**batch.by_embeds())
