"""The patched model against the unpatched one (dense plans) and the oracle (all plans), in every kind of call."""

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch

import vis_sparse
from vis_sparse.plans.budgets import resolve_heads
from vis_sparse.plans.layer_plan import PlanError
from vis_sparse.plans.plan import VisualPlan

from .. import oracle
from ..marks import slow_but
from ..models import (
    HEADS,
    IMAGE,
    LAYERS,
    TEXT_MODELS,
    deep_model,
    every_cut,
    extended,
    make_batch,
    make_model,
    random_plan,
    run,
    text_inputs,
)

BACKENDS = ("reference", "torch")
SEMANTICS = ("exclude", "zero")


@dataclass(frozen=True)
class Scenario:
    samples: tuple
    padding: str = "left"
    decode: int = 0
    chunks: bool = False  # the prompt in as many calls as its segments allow
    by: str = "ids"

    def build(self, model):
        """The batch, decoded tokens included, and where its calls end."""
        batch = make_batch(model, self.samples, self.padding)
        cuts = every_cut(batch) if self.chunks else [batch.length]
        return extended(model, batch, self.decode), [*cuts, *range(batch.length + 1, batch.length + self.decode)]


ONE, TWO, ADJACENT = (5, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (3, IMAGE, IMAGE, 4)
RAGGED = ((4, (1, 3, 5), 3), (1, (1, 1, 1), 2, (3, 2, 2), 5), (6,), (2, (1, 7, 2), 1))
SCENARIOS = {
    "one": Scenario((ONE,)),
    "first": Scenario(((IMAGE, 4),), decode=2),
    "last": Scenario(((3, IMAGE),), decode=3),
    "decode": Scenario((ONE,), decode=3),
    "chunks": Scenario(((3, IMAGE, 2, IMAGE, 3),), chunks=True, decode=2),
    "adjacent": Scenario((ADJACENT,), decode=2),
    "adjacent-chunks": Scenario((ADJACENT,), chunks=True),
    "no-image": Scenario(((9,),), decode=2),
    "left": Scenario((ONE, TWO, (7,)), decode=2),
    "right": Scenario((ONE, TWO, (7,)), padding="right", decode=2),
    "left-chunks": Scenario((ONE, (2, IMAGE, 3)), chunks=True, decode=1),
    "grid": Scenario(((4, (1, 3, 5), 3),), by="embeds", decode=2),
    "frames": Scenario(((2, (3, 2, 3), 2, (1, 2, 2), 2),), by="embeds", decode=1),
    "one-token": Scenario(((2, (1, 1, 1), (1, 1, 1), 3),), by="embeds", decode=1),
    "ragged": Scenario(RAGGED, by="embeds", decode=2),
    "ragged-right": Scenario(RAGGED, padding="right", by="embeds", decode=2),
    "grid-chunks": Scenario(((2, (1, 3, 5), 2, (2, 2, 2), 3),), by="embeds", chunks=True, decode=1),
}
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_text = pytest.mark.parametrize("text", TEXT_MODELS)
one_fast_text = pytest.mark.parametrize("text", slow_but(["llama-gqa"], TEXT_MODELS))
every_semantics = pytest.mark.parametrize("semantics", SEMANTICS)


@cache
def unpatched(text, dtype=torch.float64):
    return make_model(text, dtype=dtype)


def check(actual, expected, rows, relative=None, absolute=None):
    """Largest difference over `rows`, against `absolute` or `relative` times the largest expected value."""
    actual, expected = actual[rows].double(), expected[rows].double()
    bound = absolute if relative is None else relative * expected.abs().max()
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= bound


@every_backend
@every_scenario
@one_fast_text
@torch.no_grad()
def test_dense_plan_is_the_unpatched_model(text, scenario, backend):
    reference = unpatched(text, torch.float32)
    batch, cuts = scenario.build(reference)
    expected = reference(
        inputs_embeds=batch.embeds, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    )
    model = vis_sparse.patch(make_model(text, dtype=torch.float32), VisualPlan.dense(LAYERS), backend=backend)
    logits, _ = run(model, batch, cuts, scenario.by)
    check(logits, expected.logits, batch.attention_mask.bool(), absolute=1e-4)


@every_backend
@every_semantics
@every_scenario
@one_fast_text
@torch.no_grad()
def test_random_plan_is_the_oracle(text, scenario, semantics, backend):
    reference = unpatched(text)
    batch, cuts = scenario.build(reference)
    # another plan for each case, the same for both backends
    plan = random_plan(1 + hash_of(text, scenario, semantics), semantics)
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask)
    model = vis_sparse.patch(make_model(text), plan, backend=backend)
    logits, _ = run(model, batch, cuts, scenario.by)
    check(logits, expected, oracle.compared_rows(plan, batch.layout, batch.attention_mask), relative=1e-5)


def hash_of(text, scenario, semantics) -> int:
    place = list(SCENARIOS.values()).index(scenario)
    return (TEXT_MODELS.index(text) * len(SCENARIOS) + place) * 2 + SEMANTICS.index(semantics)


@cache
def shipped(name) -> tuple[VisualPlan, int]:
    """A shipped plan for the shallowest of a few depths that it fits, and that depth."""
    for layers in (4, 8, 16, 28, 32, 40):
        try:
            # towers have an oracle of their own
            return vis_sparse.load_plan(name).resolve(layers).replace(tower=None), layers
        except PlanError:
            continue
    raise AssertionError(f"{name} fits no common depth")


def shipped_plans():
    """(name, semantics): tokens that leave are refused under "zero"."""
    for name in vis_sparse.plan_names():
        leave = any(layer.tokens for layer in shipped(name)[0].layers)
        yield from ((name, semantics) for semantics in SEMANTICS if semantics == "exclude" or not leave)


@every_backend
@pytest.mark.parametrize("name, semantics", list(shipped_plans()))
@torch.no_grad()
def test_shipped_plan_is_the_oracle(name, semantics, backend):
    plan, layers = shipped(name)
    plan = plan.replace(semantics=semantics)
    model, reference = deep_model(layers), deep_model(layers)
    batch, cuts = Scenario((ONE, TWO, (7,)), decode=2).build(reference)
    masked = resolve_heads(plan, HEADS, 4, "first")
    expected = oracle.logits(reference, masked, batch.layout, batch.embeds, batch.attention_mask, cuts=cuts)
    logits, _ = run(vis_sparse.patch(model, plan, heads="first", backend=backend), batch, cuts)
    check(logits, expected, oracle.compared_rows(masked, batch.layout, batch.attention_mask), relative=1e-5)


@every_backend
@every_semantics
@every_text
@torch.no_grad()
def test_hidden_states(text, semantics, backend):
    """Those of visual rows too, as long as they are alive."""
    reference = unpatched(text)
    batch = make_batch(reference, [ONE, TWO, (7,)])
    plan = random_plan(300 + TEXT_MODELS.index(text), semantics)
    text_model = reference.model.language_model
    expected = oracle.hidden_states(text_model, plan, batch.layout, batch.embeds, batch.attention_mask)
    model = vis_sparse.patch(make_model(text), plan, backend=backend)
    out = model.model(**batch.by_ids(), output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    for index, (actual, wanted) in enumerate(zip(out.hidden_states, expected, strict=True)):
        rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask, index)
        assert actual.shape == wanted.shape
        check(actual, wanted, rows, relative=1e-5)
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1])


@every_backend
@every_semantics
@pytest.mark.parametrize("seed", range(400, 404))
@torch.no_grad()
def test_float32(seed, semantics, backend):
    reference = unpatched("llama-gqa", torch.float32)
    batch, cuts = SCENARIOS["left"].build(reference)
    plan = random_plan(seed, semantics)
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask)
    model = vis_sparse.patch(make_model("llama-gqa", dtype=torch.float32), plan, backend=backend)
    logits, _ = run(model, batch, cuts)
    assert logits.dtype == torch.float32
    check(logits, expected, oracle.compared_rows(plan, batch.layout, batch.attention_mask), absolute=1e-4)


@every_backend
@every_semantics
@torch.no_grad()
def test_bfloat16_is_as_close_as_the_unpatched_model(semantics, backend):
    """Mean square error against the float64 oracle on the same weights, no more than twice the dense model's own."""
    reference = unpatched("llama-gqa", torch.bfloat16)
    batch, cuts = SCENARIOS["left"].build(reference)
    plan, dense = random_plan(410, semantics), VisualPlan.dense(LAYERS)
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)

    def error(logits, plan):
        expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask)
        return (logits.double() - expected)[rows].square().mean().sqrt()

    yardstick = error(run(reference, batch, cuts)[0], dense)
    model = vis_sparse.patch(make_model("llama-gqa", dtype=torch.bfloat16), plan, backend=backend)
    logits, _ = run(model, batch, cuts)
    assert logits.dtype == torch.bfloat16
    assert 0 < error(logits, plan) <= 2 * yardstick


@every_backend
@torch.no_grad()
def test_bare_call(backend):
    """No mask, no positions, no cache: all of them have defaults."""
    reference, plan = unpatched("llama"), random_plan(420)
    batch = make_batch(reference, [TWO, (1, IMAGE, 1, IMAGE, 5)])
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds)
    model = vis_sparse.patch(make_model("llama"), plan, backend=backend)
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    logits = model(input_ids=batch.input_ids, pixel_values=batch.pixel_values, use_cache=False).logits
    check(logits, expected, rows, relative=1e-5)
    last = model(input_ids=batch.input_ids, pixel_values=batch.pixel_values, logits_to_keep=1).logits
    check(last, expected[:, -1:], slice(None), relative=1e-5)


@every_backend
@every_text
@torch.no_grad()
def test_state_dict_and_unpatch_are_exact(text, backend, tmp_path):
    original, model = unpatched(text), make_model(text)
    batch = make_batch(original, [ONE, TWO])
    parameters = {name: (tensor, tensor.data_ptr()) for name, tensor in model.named_parameters()}
    before = model(**batch.by_ids()).logits
    plan = vis_sparse.VisualPlan.yopo(LAYERS, 3, 2, [[False, True] * (HEADS // 2)] * LAYERS, ffn_ratio=2)

    vis_sparse.patch(model, plan, backend=backend)
    assert not torch.allclose(model(**batch.by_ids()).logits, before), "the plan does something"
    same_tensors(model.state_dict(), original.state_dict())
    model.save_pretrained(tmp_path)
    same_tensors(type(model).from_pretrained(tmp_path, dtype=torch.float64).state_dict(), original.state_dict())

    vis_sparse.unpatch(model)
    same_tensors(model.state_dict(), original.state_dict())
    assert {name: (tensor, tensor.data_ptr()) for name, tensor in model.named_parameters()} == parameters
    assert torch.equal(model(**batch.by_ids()).logits, before)
    assert model.model.language_model.forward.__func__ is type(model.model.language_model).forward


def same_tensors(actual: dict, expected: dict):
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@torch.no_grad()
def test_second_patch_replaces_the_first():
    reference = unpatched("qwen2-gqa")
    model, batch = make_model("qwen2-gqa"), make_batch(reference, [ONE])
    for seed in (430, 431, 431):
        plan = random_plan(seed)
        vis_sparse.patch(model, plan)
        expected = oracle.logits(reference, plan, batch.layout, batch.embeds)
        rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
        check(model(**batch.by_ids()).logits, expected, rows, relative=1e-5)
    vis_sparse.unpatch(model)
    assert torch.equal(model(**batch.by_ids()).logits, reference(**batch.by_ids()).logits)


@torch.no_grad()
def test_load_state_dict_and_dtype_while_patched():
    """New weights and another dtype reach the patched computation."""
    plan = random_plan(440)
    model, other = make_model("llama-gqa", seed=0), make_model("llama-gqa", seed=5)
    vis_sparse.patch(model, plan)
    model.load_state_dict(other.state_dict())
    batch = make_batch(other, [ONE, TWO])
    expected = oracle.logits(other, plan, batch.layout, batch.embeds, batch.attention_mask)
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    check(model(**batch.by_ids()).logits, expected, rows, relative=1e-5)
    call = batch.by_ids() | dict(pixel_values=batch.pixel_values.float())
    check(model.float()(**call).logits, expected, rows, absolute=1e-4)


class LowRank(torch.nn.Module):
    """A linear layer with an adapter, as PEFT wraps them."""

    def __init__(self, base: torch.nn.Linear, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        for name, shape in (("down", (4, base.in_features)), ("up", (base.out_features, 4))):
            noise = 0.1 * torch.randn(shape, generator=generator)
            setattr(self, name, torch.nn.Parameter(noise.to(base.weight.dtype)))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@every_backend
@every_semantics
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_wrapped_linear_layers(when, semantics, backend):
    """Adapters put on before or after patching are computed, not passed by."""
    model, reference = make_model("llama-bias"), make_model("llama-bias")
    plan = random_plan(460, semantics)
    if when == "after":
        vis_sparse.patch(model, plan, backend=backend)
    for index, (layer, merged) in enumerate(
        zip(model.model.language_model.layers, reference.model.language_model.layers, strict=True)
    ):
        for part, names in (("self_attn", ("q_proj", "v_proj", "o_proj")), ("mlp", ("up_proj", "down_proj"))):
            for name in names:
                wrapped = LowRank(getattr(getattr(layer, part), name), seed=index)
                setattr(getattr(layer, part), name, wrapped)
                getattr(getattr(merged, part), name).weight += wrapped.up @ wrapped.down
    if when == "before":
        vis_sparse.patch(model, plan, backend=backend)
    batch = make_batch(reference, [ONE, TWO])
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask)
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    check(model(**batch.by_ids()).logits, expected, rows, relative=1e-5)


@torch.no_grad()
def test_nested_patches():
    reference, model = unpatched("llama"), make_model("llama")
    batch = make_batch(reference, [ONE])

    def holds(plan):
        expected = oracle.logits(reference, plan, batch.layout, batch.embeds)
        rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
        check(model(**batch.by_ids()).logits, expected, rows, relative=1e-5)

    outer, inner = random_plan(470), random_plan(471, "zero")
    with vis_sparse.patched(model, outer):
        with vis_sparse.patched(model, inner):
            holds(inner)
        holds(outer)
    assert torch.equal(model(**batch.by_ids()).logits, reference(**batch.by_ids()).logits)


@torch.no_grad()
def test_deepcopy_of_a_patched_model():
    """The copy is patched too, and both are on their own from then on."""
    reference, plan = unpatched("llama"), random_plan(480)
    batch = make_batch(reference, [ONE])
    model = vis_sparse.patch(make_model("llama"), plan)
    before = model(**batch.by_ids()).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch.by_ids()).logits, before)
    vis_sparse.unpatch(model)
    assert torch.equal(twin(**batch.by_ids()).logits, before)
    assert torch.equal(vis_sparse.unpatch(twin)(**batch.by_ids()).logits, reference(**batch.by_ids()).logits)


def test_training_a_projector_after_inference_mode():
    """What a call under inference_mode leaves behind must not stop autograd; the text model is frozen."""
    plan = vis_sparse.VisualPlan.yopo(LAYERS, 3, 2, [[False, True] * (HEADS // 2)] * LAYERS, ffn_ratio=2)
    model, reference = vis_sparse.patch(make_model("llama"), plan), make_model("llama")
    batch = make_batch(reference, [ONE])
    for each in (model, reference):
        each.model.language_model.requires_grad_(False)
    with torch.inference_mode():
        model(**batch.by_ids())
    model(**batch.by_ids()).logits[:, -1].sum().backward()
    embeds = text_inputs(reference, **batch.by_ids(), grad=True)
    oracle.logits(reference, plan, batch.layout, embeds)[:, -1].sum().backward()
    grad, wanted = (each.model.multi_modal_projector.linear_1.weight.grad for each in (model, reference))
    assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@every_backend
@every_semantics
@every_text
def test_gradients(text, semantics, backend):
    """Of all parameters, vision tower and projector included, from a loss on text rows."""
    plan = random_plan(450 + TEXT_MODELS.index(text), semantics)
    reference, model = make_model(text), vis_sparse.patch(make_model(text), plan, backend=backend)
    batch = make_batch(reference, [ONE, TWO, (7,)])
    rows = batch.attention_mask.bool() & ~oracle.grid_of(batch.layout, batch.length).visual
    weights = torch.randn(int(rows.sum()), 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    embeds = text_inputs(reference, **batch.by_ids(), grad=True)
    logits = oracle.logits(reference, plan, batch.layout, embeds, batch.attention_mask)
    (logits[rows] * weights).sum().backward()
    (model(**batch.by_ids()).logits[rows] * weights).sum().backward()

    expected = {name: tensor.grad for name, tensor in reference.named_parameters()}
    for name, tensor in model.named_parameters():
        grad, wanted = (torch.zeros_like(tensor) if g is None else g for g in (tensor.grad, expected[name]))
        assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1), name
