"""Gradients of a patched model that trains in part."""

import warnings

import pytest
import torch

import vis_sparse
from vis_sparse.executor import weights
from vis_sparse.patches import unpatched
from vis_sparse.plans.plan import VisualPlan

from ..models import IMAGE, LAYERS, make_batch, make_model, random_plan
from .test_checkpointing import gradients


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
