"""Plans in an engine against the transformers executor, row by row in float64: chunks, shared prefixes, several images,
requests of several plans in one call, both layouts."""

import numpy as np
import pytest
import torch

import vis_sparse
from tests import models
from tests.marks import slow_but
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.plans.layer_plan import LayerPlan
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.serving.cuts import Shards, VisualFFN
from vis_sparse.serving.errors import ServingError

from .fake_engine import FFN, Engine

LAYERS, NEURONS = models.LAYERS, models.NEURONS
DENSE = VisualPlan.dense(LAYERS)
VICA = VisualPlan.vica(LAYERS, [0, 2])
OFF = VisualPlan((LayerPlan.off(),) * LAYERS, "off")
WHOLE, BROKEN = (1, 2, 4), (1, 3, 3)  # 8 and 9 visual tokens: whole blocks of 4, and not


def random_plan(seed: int) -> VisualPlan:
    """One that an engine can run."""
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(LAYERS):
        reads = bool(rng.random() < 0.6)
        attention = "full" if reads and rng.random() < 0.5 else "none"
        indices = tuple(sorted(int(i) for i in rng.choice(NEURONS, rng.integers(0, NEURONS), replace=False)))
        layers.append(LayerPlan(reads, attention, None, [0.0, 1.0, 0.4, indices][rng.integers(4)]))
    return VisualPlan(tuple(layers), f"random-{seed}")


def prompts(model, samples, seed=1):
    """(embeddings, tokens' names, visual ranges, layout) of each sample."""
    batch = models.make_batch(model, samples, padding="right", seed=seed)
    found = []
    for row in range(len(samples)):
        length = int(batch.attention_mask[row].sum())
        segments = [s for s in batch.layout.segments if s.sample == row]
        grids = [(s.start, (s.frames, s.height, s.width)) for s in segments]
        embeds = batch.embeds[row, :length]
        names = tuple(tuple(each.tolist()) for each in embeds)
        found.append((embeds, names, [(s.start, s.end - 1) for s in segments], VisualLayout.from_grids([grids])))
    return found


@torch.no_grad()
def expected(model, plan, embeds, layout):
    with vis_sparse.patched(model, plan), vis_sparse.use_layout(model, layout):
        return model(inputs_embeds=embeds[None], use_cache=False).logits[0]


def serve(engine: Engine, requests, seed: int) -> None:
    """All requests to their ends, in random company and chunks."""
    random = np.random.default_rng(seed)
    waiting, running = list(requests), []
    while waiting or running:
        if waiting and (not running or random.random() < 0.6):
            running.append(waiting.pop(0))
            engine.admit(running[-1])
        if running[1:] and random.random() < 0.1:
            waiting.append(running.pop())
        chosen = [request for request in running if random.random() < 0.8] or running[:1]
        engine.step(chosen, [int(random.integers(1, min(9, len(r.embeds) - r.done) + 1)) for r in chosen])
        running = [request for request in running if request.done < len(request.embeds)]


def check(model, engine, plans, text_prompts, seed, which=None):
    requests = []
    for index, (embeds, names, ranges, _) in enumerate(text_prompts):
        plan = plans[(index if which is None else which) % len(plans)]
        requests.append(engine.request(embeds, names, ranges, plan.name))
    serve(engine, requests, seed)
    for request, (embeds, _, _, layout) in zip(requests, text_prompts):
        rows = torch.cat(request.rows)
        wanted = expected(model, engine.loaded.plans[request.note["plan"]], embeds, layout)
        torch.testing.assert_close(rows, wanted[len(wanted) - len(rows) :], rtol=0, atol=1e-9)
    return requests


SAMPLES = [(2, WHOLE, 5), (6,), (1, WHOLE, 3, WHOLE, WHOLE, 4), (2, BROKEN, 5), (3, WHOLE, 1, BROKEN, 7), (WHOLE, 2)]


@pytest.mark.parametrize("text", slow_but(["llama-gqa", "qwen2-gqa"], models.TEXT_MODELS))
def test_plans_in_company(text):
    """Plans beside each other, of requests in both layouts, in random chunks."""
    model = models.make_model(text)
    plans = [VICA, DENSE, random_plan(3), random_plan(4), OFF]
    check(model, Engine(model, plans), plans, prompts(model, SAMPLES), seed=5)


@pytest.mark.parametrize("seed", slow_but(range(4), range(40)))
def test_random_plans(seed):
    model = models.make_model("llama-gqa")
    plans = [random_plan(seed), random_plan(1000 + seed), DENSE][: 1 + seed % 3]
    check(model, Engine(model, plans, block=(2, 4, 8)[seed % 3]), plans, prompts(model, SAMPLES, seed), seed)


@pytest.mark.parametrize("plan", [VICA, random_plan(4)], ids=lambda plan: plan.name)
def test_one_visual_row_in_a_step(plan):
    """The last one of an image, with text behind it; and the first one, alone."""
    model = models.make_model("llama-gqa")
    [(embeds, names, ranges, layout)] = prompts(model, [(2, WHOLE, 5)])
    wanted = expected(model, plan, embeds, layout)
    for steps in ([9, len(embeds) - 9], [2, 1, 6, len(embeds) - 9]):
        engine = Engine(model, [plan])
        request = engine.request(embeds, names, ranges, plan.name)
        engine.admit(request)
        for rows in steps:
            engine.step([request], [rows])
        torch.testing.assert_close(torch.cat(request.rows), wanted, rtol=0, atol=1e-9)


def test_prefixes_are_shared_within_a_plan_only():
    """The same prompts again, and prompts that go on differently: blocks are taken over, and the logits stay."""
    model = models.make_model("llama-gqa")
    plans = [VICA, DENSE]
    engine = Engine(model, plans)
    first = prompts(model, [(2, WHOLE, 9), (3, BROKEN, 9)])
    other = [(torch.cat([e[:14], e[:5]]), (*n[:14], *n[:5]), r, layout) for e, n, r, layout in first]
    for which in (0, 0, 1, 1, 0):
        check(model, engine, plans, first, seed=1, which=which)
        check(model, engine, plans, other, seed=2, which=which)
    again = [engine.request(embeds, names, ranges, "vica") for embeds, names, ranges, _ in first]
    for request in again:
        engine.admit(request)
    # whole blocks: everything but the last token's block; a broken image: nothing under a plan that lays text out
    assert [request.done for request in again] == [16, 0]
    dense = engine.request(*first[1][:3], "dense")
    engine.admit(dense)
    assert dense.done == 20


def test_rows_that_are_left_out_never_enter():
    model = models.make_model("llama-gqa")
    plan = VisualPlan((LayerPlan(ffn=0.5), LayerPlan(attention="none"), LayerPlan(attention="none", ffn=0)), "mix")
    engine = Engine(model, [plan, VICA])
    [(embeds, names, ranges, _)] = prompts(model, [(2, WHOLE, 5)])
    request = engine.request(embeds, names, ranges, "mix")
    engine.admit(request)
    engine.step([request], [15])
    assert engine.rows("qkv") == [15, 7, 7] and engine.rows("ffn") == [7, 15, 7]
    assert engine.forward.rows_entered == {"attention": [15, 7, 7], "ffn": [15, 15, 7]}
    assert engine.model.language_model.model.calls == 0
    frozen = engine.request(embeds, names, ranges, "vica")
    engine.admit(frozen)
    engine.step([frozen], [15])
    assert engine.rows("qkv") == [22, 14, 14] and engine.model.language_model.model.calls == 1
    engine.step([engine.request(embeds[:2], names[:2], [], "mix")], [2])
    assert engine.rows("qkv") == [24, 16, 16] and engine.model.language_model.model.calls == 2
    assert engine.forward.rows_scheduled == 32


def test_a_step_of_visual_rows_alone():
    """A chunk inside an image: nothing to ask of layers that only text enters."""
    model = models.make_model("llama-gqa")
    [(embeds, names, ranges, layout)] = prompts(model, [(2, WHOLE, 5)])
    for plan in (VICA, random_plan(1)):
        engine = Engine(model, [plan])
        request = engine.request(embeds, names, ranges)
        engine.admit(request)
        for count in (3, 4, 3, 5):
            engine.step([request], [count])
        torch.testing.assert_close(torch.cat(request.rows), expected(model, plan, embeds, layout), rtol=0, atol=1e-9)


def test_profiling_runs_the_engines_own_forward():
    model = models.make_model("llama-gqa")
    engine = Engine(model, [VICA])
    engine.context = type("Context", (), {"attn_metadata": None})()
    engine.forward.original = lambda *args: args
    assert engine.forward("ids", "positions") == ("ids", "positions", None, None)


def test_a_request_without_a_note_is_refused_where_prefixes_are_shared():
    from vis_sparse.serving.runtime import facts_of

    engine = Engine(models.make_model("llama-gqa"), [VICA])
    with pytest.raises(ServingError, match="without the plug-in's note"):
        facts_of([(2, 5)], None, engine.loaded, True)
    assert facts_of([(2, 5)], None, engine.loaded, False) == ([(2, 4)], 0, True)
    assert facts_of([], None, engine.loaded, True) == ([], 0, True)


@pytest.mark.parametrize("text", ["llama-gqa", "llama-bias"])
def test_shards_of_an_ffn_add_up(text):
    """Each worker takes the neurons it holds, and one of them the bias."""
    layer = models.make_model(text).model.language_model.layers[0].mlp
    whole, half = FFN(layer), NEURONS // 2
    x = torch.randn(5, 64, dtype=torch.float64)
    for neurons in (10, 30, NEURONS, (0, 3, 25, 47), (40, 41)):
        total = 0
        for rank in range(2):
            shard = FFN(layer)
            rows = slice(rank * half, (rank + 1) * half)
            for name in ("weight", "bias"):
                gate_up = getattr(shard.gate_up_proj, name)
                if gate_up is not None:
                    gate, up = gate_up.data.chunk(2)
                    setattr(shard.gate_up_proj, name, torch.nn.Parameter(torch.cat([gate[rows], up[rows]])))
            shard.down_proj.weight = torch.nn.Parameter(shard.down_proj.weight[:, rows].detach())
            total = total + VisualFFN(shard, neurons, NEURONS, Shards(rank, 2), None)(x)
        expected_out = VisualFFN(whole, neurons, NEURONS, Shards(), None)(x)
        torch.testing.assert_close(total, expected_out, rtol=0, atol=1e-12)


def test_a_kernel_block_that_cuts_the_layout_is_refused():
    engine = Engine(models.make_model("llama-gqa"), [VICA])
    backend = engine.layers[1].self_attn.attn.attn_backend
    with pytest.raises(ServingError, match="kernel blocks of 3"):
        backend.get_builder_cls()(type("Spec", (), {"block_size": 3}), ["layers.1"])
    assert backend.get_builder_cls().get_cudagraph_support().name == "NEVER"
