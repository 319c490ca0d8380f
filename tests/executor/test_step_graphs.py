"""Decode steps as recordings: the tokens and logits of eager ones, whatever happens to caches and weights between them.

A recording is run here as it was traced, not compiled: what it reads and writes is bound to the places it found, as a
CUDA graph's is.
"""

import copy
import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import vis_sparse
from vis_sparse.executor import recorded, step_graphs
from vis_sparse.patches.errors import PatchError
from vis_sparse.plans.plan import VisualPlan

from ..marks import slow_but
from ..models import IMAGE, LAYERS, dropping, extended, make_batch, make_model, random_plan, run
from .test_static import WAYS
from .test_steps import BATCHES

PLANS = {plan.name: plan for plan in (random_plan(600), random_plan(601, "zero"), dropping(602))}


@pytest.fixture
def graphs(monkeypatch) -> list:
    """The graphs that are recorded, which run as they are."""
    found = []
    monkeypatch.setattr(recorded, "compiled", lambda graph: found.append(graph) or graph)
    return found


def pair(plan, text: str = "llama-gqa", **changes):
    """The same model with and without graphs."""
    return (vis_sparse.patch(make_model(text, **changes), plan, graphs=graphs) for graphs in (False, True))


def behind(model, batch, steps: int = 3):
    """A cache that holds the batch, and the batch with more text."""
    return run(model, batch)[1], extended(model, batch, steps)


def step(model, longer, cache, column: int):
    return run(model, cut(longer, column + 1), cache=cache, start=column)[0]


def cut(batch, length: int):
    return replace(
        batch, input_ids=batch.input_ids[:, :length], attention_mask=batch.attention_mask[:, :length],
        embeds=batch.embeds[:, :length],
    )  # fmt: skip


@pytest.mark.parametrize("name", slow_but(["left"], BATCHES))
@pytest.mark.parametrize("way", slow_but(["greedy"], WAYS))
@torch.no_grad()
def test_generate_gives_the_eager_tokens(way, name, graphs):
    eager, fast = pair(random_plan(600))
    batch = make_batch(eager, BATCHES[name][0])  # generation is padded on the left
    tokens = []
    for model in (eager, fast, fast):
        torch.manual_seed(0)
        tokens.append(model.generate(**batch.to_generate(), max_new_tokens=8, **WAYS[way]))
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])
    assert len(graphs) == 2, "one recording serves all steps of both calls, one the second prompt"


@pytest.mark.parametrize("name", slow_but(["right"], BATCHES))
@pytest.mark.parametrize("plan", slow_but(["random-600"], PLANS))
@torch.no_grad()
def test_steps_are_the_eager_ones(plan, name, graphs):
    """One column masked behind the prompt too, which nobody may read."""
    eager, fast = pair(PLANS[plan], "qwen2-gqa")
    batch = make_batch(eager, *BATCHES[name])
    longer = extended(eager, batch, 4)
    longer.attention_mask[0, batch.length] = 0
    cuts = range(batch.length, longer.length)
    expected, given = (run(model, longer, cuts)[0] for model in (eager, fast))
    torch.testing.assert_close(given, expected)
    assert len(graphs) == 1


@pytest.mark.slow
@torch.no_grad()
def test_calls_of_every_kind_after_one_another(graphs):
    """Steps, text, another picture, steps, columns cropped, a copy that goes its own way, beams that repeat."""
    eager, fast = pair(random_plan(603))
    prompt = [(5, IMAGE, 4), (2, IMAGE, 7)]
    batch = make_batch(eager, [(*sample, 2, IMAGE, 9) for sample in prompt])
    start = make_batch(eager, prompt).length
    cuts = [start, start + 1, start + 2, start + 2 + 16, start + 20, start + 21, start + 22]
    found = []
    for model in (eager, fast):
        logits, cache = run(model, batch, cuts)
        twin = copy.deepcopy(cache)
        longer = extended(model, batch, 4)
        found.append(logits)
        for held, seed in ((cache, 5), (twin, 6), (cache, 7)):
            token = torch.randint(1, 90, (2, 1), generator=torch.Generator().manual_seed(seed))
            found.append(model(input_ids=token, past_key_values=held).logits)
        cache.crop(batch.length)
        found.append(run(model, longer, range(batch.length, longer.length), cache=cache, start=batch.length)[0])
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
        for _ in range(2):
            found.append(model(input_ids=torch.ones(4, 1, dtype=torch.long), past_key_values=cache).logits)
    half = len(found) // 2
    for expected, given in zip(found[:half], found[half:]):
        torch.testing.assert_close(given, expected)
    assert graphs


@pytest.mark.slow
@torch.no_grad()
def test_caches_side_by_side_have_recordings_of_their_own(graphs):
    eager, fast = pair(random_plan(604))
    batches = [make_batch(eager, [(5, IMAGE, 4)], seed=seed) for seed in (1, 2)]
    expected = [run(eager, extended(eager, batch, 4), range(batch.length, batch.length + 4))[0] for batch in batches]
    held = [behind(fast, batch, 4) for batch in batches]
    start = batches[0].length
    for column in range(start, start + 4):
        for (cache, longer), logits in zip(held, expected):
            torch.testing.assert_close(step(fast, longer, cache, column)[:, 0], logits[:, column])
    assert len(graphs) == 3, "one of prompts, and one of steps for each cache"
    del held, cache
    gc.collect()
    for batch, logits in zip(batches, expected):
        longer = extended(fast, batch, 4)
        torch.testing.assert_close(run(fast, longer, range(start, start + 4))[0], logits)
    assert len(graphs) == 3, "recordings of caches that are gone serve new ones"


def scaled_in_place(model):
    model.model.language_model.layers[1].self_attn.q_proj.weight.mul_(0.5)


def other_data(model):
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    weight.data = weight.data * 0.5


def other_module(model):
    ffn = model.model.language_model.layers[0].mlp
    up = torch.nn.Linear(*reversed(ffn.up_proj.weight.shape), bias=False, dtype=ffn.up_proj.weight.dtype)
    torch.nn.init.constant_(up.weight, 0.01)
    ffn.up_proj = up


def other_epsilon(model):
    model.model.language_model.layers[1].post_attention_layernorm.variance_epsilon = 10.0


def a_hook(model):
    model.model.language_model.layers[1].mlp.gate_proj.register_forward_hook(lambda module, args, out: out * 0.5)


CHANGES = [scaled_in_place, other_data, other_module, other_epsilon, a_hook]


@pytest.mark.parametrize("change", slow_but([other_data], CHANGES))
@torch.no_grad()
def test_changes_between_steps_are_noticed(change, graphs):
    eager, fast = pair(random_plan(605))
    batch = make_batch(eager, *BATCHES["left"])
    found = []
    for model in (eager, fast):
        cache, longer = behind(model, batch)
        found.append(step(model, longer, cache, batch.length))
        change(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if change is not a_hook else "ignore")
            found += [step(model, longer, cache, batch.length + more) for more in (1, 2)]
    for expected, given in zip(found[:3], found[3:]):
        torch.testing.assert_close(given, expected)
    other = run(next(pair(random_plan(605))), longer)[0]
    assert not torch.allclose(found[1][:, 0], other[:, batch.length + 1]), "the change shows"


@pytest.mark.parametrize("backend", ["flex", "reference"])
def test_backends_whose_tables_are_no_tensors_are_refused(backend):
    model = make_model()
    with pytest.raises(PatchError, match=f"graphs: got True with backend {backend}, expected auto"):
        vis_sparse.patch(model, VisualPlan.dense(LAYERS), backend=backend, graphs=True)
    assert vis_sparse.inspect(model) is None


@torch.no_grad()
def test_what_cannot_be_recorded_is_said_once(graphs):
    eager, fast = pair(VisualPlan.dense(LAYERS))
    a_hook(fast)
    batch = make_batch(eager, [(5, IMAGE, 4)])
    with pytest.warns(UserWarning, match="graphs=True: got decoder layers with modules"):
        run(fast, extended(fast, batch, 1), [batch.length])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(fast, extended(fast, batch, 1), [batch.length])
    assert not graphs


@pytest.mark.slow
@torch.no_grad()
def test_more_steps_than_a_recording_has_room_for(graphs, monkeypatch):
    monkeypatch.setattr(step_graphs, "_ROOM", 8)
    eager, fast = pair(random_plan(606))
    batch = make_batch(eager, *BATCHES["left"])
    longer = extended(eager, batch, 40)
    cuts = range(batch.length, longer.length)
    torch.testing.assert_close(run(fast, longer, cuts)[0], run(eager, longer, cuts)[0])
    assert 1 < len(graphs) < 6


@pytest.mark.slow
@torch.no_grad()
def test_hidden_states_and_gradients_are_those_of_eager_steps(graphs):
    eager, fast = pair(random_plan(607))
    batch = make_batch(eager, *BATCHES["left"])
    found = []
    for model in (eager, fast):
        cache, longer = behind(model, batch)
        step(model, longer, cache, batch.length)
        token = longer.input_ids[:, batch.length + 1 : batch.length + 2]
        found.append(model(input_ids=token, past_key_values=cache, output_hidden_states=True).hidden_states)
        found.append([step(model, longer, cache, batch.length + 2)])
    for expected, given in zip([*found[0], *found[1]], [*found[2], *found[3]]):
        torch.testing.assert_close(given, expected)
    with torch.enable_grad():
        loss = fast(**batch.by_ids()).logits.sum()
    assert loss.requires_grad


@pytest.mark.slow
@torch.inference_mode()
def test_inference_mode(graphs):
    eager, fast = pair(random_plan(608))
    batch = make_batch(eager, *BATCHES["left"])
    tokens = [model.generate(**batch.to_generate(), max_new_tokens=6) for model in (eager, fast)]
    assert torch.equal(*tokens) and len(graphs) == 1


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    """Recordings as a CPU gets them, of a prompt and of steps: compiled once each."""
    eager, fast = pair(random_plan(609, layers=2), num_hidden_layers=2, dtype=torch.float32)
    for seed in (1, 2, 3):
        batch = make_batch(eager, [(5, IMAGE, 4 + seed), (2, IMAGE, 3)], seed=seed)
        tokens = [model.generate(**batch.to_generate(), max_new_tokens=12) for model in (eager, fast)]
        assert torch.equal(*tokens)
    found = fast.model.language_model._vis_sparse.graphs
    assert [len(prompts._graphs) for _, prompts in found.values()] == [1]


@pytest.mark.slow
@torch.no_grad()
def test_threads(graphs):
    """Each with a cache of its own, all at once."""
    eager, fast = pair(random_plan(610))
    batches = [make_batch(eager, [(5, IMAGE, 4), (2, IMAGE, 3)], seed=seed) for seed in range(4)]
    expected = [eager.generate(**batch.to_generate(), max_new_tokens=6) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(_generated, fast, batch) for batch in batches * 2]
        given = [call.result() for call in calls]
    assert all(map(torch.equal, given, expected * 2))


def _generated(model, batch):
    with torch.no_grad():
        return model.generate(**batch.to_generate(), max_new_tokens=6)
