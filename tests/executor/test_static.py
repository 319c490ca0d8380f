"""Static caches: decode steps of one shape that look at no value, traced whole once for all of them."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import StaticCache

import vis_sparse
from vis_sparse.patches.errors import PatchError
from vis_sparse.plans.plan import VisualPlan

from ..marks import slow_but
from ..models import IMAGE, LAYERS, deep_model, extended, make_batch, make_model, random_plan, run
from .test_steps import BATCHES

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
}


def in_fp32(batch):
    return replace(batch, pixel_values=batch.pixel_values.float(), embeds=batch.embeds.float())


def filled(model, batch, capacity: int) -> StaticCache:
    """A static cache that holds the batch."""
    cache = StaticCache(config=model.config.text_config, max_cache_len=capacity)
    assert run(model, batch, cache=cache)[1] is cache
    return cache


@pytest.mark.parametrize("name", slow_but(["left", "ragged"], BATCHES))
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_generate_gives_the_tokens_of_a_dynamic_cache(way, name):
    model = vis_sparse.patch(make_model("llama-gqa"), random_plan(600))
    batch = make_batch(model, BATCHES[name][0])  # generation is padded on the left
    tokens = []
    for cache in (None, "static"):
        torch.manual_seed(0)
        tokens.append(
            model.generate(**batch.to_generate(), max_new_tokens=8, cache_implementation=cache, **WAYS[way])
        )
    assert torch.equal(*tokens)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("seed", [600, 601, 602])
@torch.no_grad()
def test_steps_text_and_pictures_after_one_another(seed, padding):
    """Steps on a static cache, a call of text, another picture, steps again: each as on a dynamic one."""
    model = vis_sparse.patch(make_model("llama-gqa"), random_plan(seed))
    prompt = [(5, IMAGE, 4), (2, IMAGE, 7)]
    whole = make_batch(model, [(*sample, 9) for sample in prompt], padding)
    first = make_batch(model, prompt, padding)
    start = first.length
    cuts = [start, start + 1, start + 2, start + 5, start + 6]
    expected, _ = run(model, whole, cuts)
    cache = StaticCache(config=model.config.text_config, max_cache_len=whole.length)
    given, _ = run(model, whole, cuts, cache=cache)
    torch.testing.assert_close(given, expected)
    assert cache.is_compileable and int(cache.get_seq_length()) == whole.length
    with pytest.raises(PatchError, match="expected at most its"):
        model(input_ids=torch.ones(2, 2, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("plan", ["dense", *vis_sparse.plan_names()])
@torch.no_grad()
def test_a_step_looks_at_no_value(plan):
    """Not even at how full the cache is."""
    model = vis_sparse.patch(deep_model(8, torch.float32), plan, heads="first")
    batch = in_fp32(make_batch(model, *BATCHES["left"]))
    cache = filled(model, batch, batch.length + 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = dict(
            input_ids=torch.zeros(2, 1, dtype=torch.long),
            attention_mask=torch.ones(2, batch.length + 8, dtype=torch.long),
            position_ids=torch.zeros(2, 1, dtype=torch.long),
        )
        for layer in cache.layers:  # what a look is taken at
            if layer.leads:
                fixed = layer.book.fixed
                fixed.column, fixed.at = fixed.column + 0, [at + 0 for at in fixed.at]
        out = model(**step, past_key_values=cache)
    assert out.logits.shape == (2, 1, model.config.text_config.vocab_size)


class Counting:
    """A compiler that counts graphs, and runs them as they are or hands them to another one."""

    def __init__(self, compiler=None):
        self.graphs, self.compiler = 0, compiler

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward if self.compiler is None else self.compiler(graph, inputs)


@pytest.mark.parametrize("plan", slow_but(["yopo-12"], ["dense", *vis_sparse.plan_names()]))
@torch.no_grad()
def test_one_graph_serves_all_steps(plan):
    model = vis_sparse.patch(deep_model(4, torch.float32), plan, heads="first")
    serves_all_steps(model, Counting())


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_of_inductor_serves_all_steps():
    from torch._inductor.compile_fx import compile_fx

    serves_all_steps(vis_sparse.patch(deep_model(2, torch.float32), random_plan(601, layers=2)), Counting(compile_fx))


def serves_all_steps(model, compiler: Counting):
    torch._dynamo.reset()
    batch, steps = in_fp32(make_batch(model, *BATCHES["left"])), 64
    longer = extended(model, batch, steps)
    expected, _ = run(model, longer, range(batch.length, longer.length))
    cache = filled(model, batch, longer.length)
    compiled = torch.compile(model.forward, fullgraph=True, backend=compiler)
    mask = longer.attention_mask
    for column in range(batch.length, longer.length):
        logits = compiled(
            input_ids=longer.input_ids[:, column : column + 1],
            attention_mask=mask,
            position_ids=longer.position_ids[:, column : column + 1],
            past_key_values=cache,
        ).logits
        torch.testing.assert_close(logits[:, 0], expected[:, column], atol=1e-4, rtol=1e-4)
    assert compiler.graphs == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_a_static_cache_of_the_unpatched_model_is_refused():
    model = make_model()
    batch = make_batch(model, [(3, IMAGE, 4)])
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    model(input_ids=torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
    vis_sparse.patch(model, VisualPlan.dense(LAYERS))
    with pytest.raises(PatchError, match="StaticCache"):
        model(**batch.by_ids() | dict(attention_mask=None, position_ids=None), past_key_values=cache)


@torch.no_grad()
def test_prompts_with_a_mask_that_is_not_causal_are_refused():
    model = vis_sparse.patch(make_model(), VisualPlan.dense(LAYERS))
    batch = make_batch(model, [(3, IMAGE, 4)])
    mask = torch.ones(1, 1, batch.length, 64, dtype=torch.bool).tril()
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    model(**batch.by_ids() | dict(attention_mask=mask), past_key_values=cache)
    mask[0, 0, 1, 2] = True
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with pytest.raises(PatchError, match="not causal"):
        model(**batch.by_ids() | dict(attention_mask=mask), past_key_values=cache)
