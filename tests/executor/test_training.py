"""Gradients of a patched model that trains in part."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import vis_sparse
from vis_sparse.executor import weights
from vis_sparse.patches import unpatched
from vis_sparse.plans.plan import VisualPlan

from ..kernels.executor import largest_gradient_difference
from ..marks import slow_but
from ..models import IMAGE, LAYERS, TEXT_MODELS, make_batch, make_model, random_plan
from ..patches.wrap_kinds import lora
from .test_checkpointing import gradients
from .test_kept_cuts import SCATTERED


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
def test_checkpointing_with_frozen_inputs(part):
    """One part of every layer trains: nothing that enters the first layer has a gradient."""
    model = vis_sparse.patch(make_model(), random_plan(800)).train()
    batch = make_batch(model, [(5, IMAGE, 4)])
    model.requires_grad_(False)
    for layer in model.model.language_model.layers:
        layer.get_submodule(part).requires_grad_(True)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable()
    model.disable_input_require_grads()  # which transformers asks for, for the sake of reentrant checkpoints
    found = gradients(model, batch)
    assert len(expected) == LAYERS and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_checkpointing_is_off_in_evaluation():
    model = vis_sparse.patch(make_model(), random_plan(801))
    model.gradient_checkpointing_enable()
    model.eval()
    batch = make_batch(model, [(5, IMAGE, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = model(**batch.by_ids(), use_cache=True).past_key_values
    assert cache.get_seq_length() == batch.length


def test_gradients_of_inputs_through_frozen_weights(monkeypatch):
    """As prompt tuning asks for them, in fp32 on a CPU, by the routines of large products."""
    monkeypatch.setattr(weights, "_ONE_DNN_FROM", 1)
    monkeypatch.setattr(weights, "_ONE_DNN_WEIGHTS", 0)
    model = vis_sparse.patch(make_model(dtype=torch.float32), VisualPlan.dense(LAYERS)).requires_grad_(False)
    batch = make_batch(model, [(5, IMAGE, 4)])

    def gradient() -> torch.Tensor:
        embeds = batch.embeds.clone().requires_grad_()
        model(**batch.by_embeds() | dict(inputs_embeds=embeds)).logits.square().sum().backward()
        return embeds.grad

    with vis_sparse.use_layout(model, batch.layout):
        found = gradient()
    with unpatched(model):
        torch.testing.assert_close(found, gradient(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
@pytest.mark.parametrize("text", slow_but(["llama-gqa"], TEXT_MODELS))
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_in_fp32(backend, text, semantics):
    assert largest_gradient_difference(backend, text, semantics) <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("seed", [800, 803])
def test_gradients_under_autocast(seed, checkpointing):
    """Products in bf16: as far from fp32 as the unpatched model's are under autocast, and gradients in fp32."""
    batch = make_batch(make_model(dtype=torch.float32), [(5, IMAGE, 4), (3, IMAGE, 6)])

    def errors(plan) -> torch.Tensor:
        model = make_model(dtype=torch.float32).train()
        if plan is not None:
            vis_sparse.patch(model, plan)
        expected = gradients(model, batch)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, batch)
        assert found.keys() == expected.keys() and {g.dtype for g in found.values()} == {torch.float32}
        return torch.tensor([float((found[n] - g).norm() / g.norm()) for n, g in expected.items() if g.norm() > 0])

    unpatched_errors, own = errors(None), errors(random_plan(seed))
    assert 1e-3 < unpatched_errors.median() < 0.1, "rounding of bf16, and that it is on"
    assert own.median() <= 2 * unpatched_errors.median() and own.max() <= 3 * unpatched_errors.max()


class Copies(TorchDispatchMode):
    """Counts tensors that are made out of parameters by copying."""

    def __init__(self, model):
        super().__init__()
        self._storages = {p.untyped_storage().data_ptr() for p in model.model.language_model.layers.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _COPYING:
            given = {t.untyped_storage().data_ptr() for t in tree_iter(args) if isinstance(t, torch.Tensor)}
            is_copy = out.dim() == 2 and out.untyped_storage().data_ptr() not in given  # fingerprints are vectors
            self.count += is_copy and bool(given & self._storages)
        return out


_COPYING = {torch.ops.aten.index_select, torch.ops.aten.index, torch.ops.aten.cat, torch.ops.aten.clone,
            torch.ops.aten._to_copy, torch.ops.aten.copy_}  # fmt: skip
# heads all, neurons the first ones
_FIRST = VisualPlan.yopo(LAYERS, window=3, ffn_ratio=3)


@pytest.mark.parametrize("kind", ["whole", "frozen", "lora"])
@pytest.mark.parametrize("plan", [VisualPlan.dense(LAYERS), _FIRST, SCATTERED], ids=["dense", "first", "scattered"])
def test_no_copy_of_a_weight_is_made_for_nothing(plan, kind):
    """Cuts that are views copy nothing. Scattered ones of weights that train are copied in the forward pass, and again
    in the backward pass where that keeps none alive between; those of frozen weights never again; under adapters, whose
    layers are called whole, none are."""
    model = make_model(dtype=torch.float32)
    if kind == "frozen":
        model.model.language_model.requires_grad_(False)
    called = vis_sparse.patch(lora(model) if kind == "lora" else model, plan)
    batch = make_batch(make_model(dtype=torch.float32), [(5, IMAGE, 4)])

    def step() -> tuple[int, int]:
        with Copies(model) as forward:
            loss = called(**batch.by_ids(), labels=batch.input_ids, use_cache=False).loss
        with Copies(model) as backward:
            loss.backward()
        called.zero_grad()
        return forward.count, backward.count

    state = model.model.language_model._vis_sparse
    (executor,) = state.executors.values()
    cut = sum(len(each.modules()) for lane in executor.layers for each in lane.cuts.values() if each.copies)
    assert (cut > 0) == (plan is SCATTERED)
    assert step()[0] == (0 if kind == "lora" else cut)
    forward, backward = step()
    assert forward == (cut if kind == "whole" else 0) and backward <= forward
    assert vis_sparse.inspect(called)["extra_bytes"] == 0 or kind == "frozen"
