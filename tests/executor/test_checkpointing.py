"""Gradient checkpointing of a patched model: the same gradients, each layer run twice, no cache."""

import pytest
import torch
from transformers import DynamicCache

import vis_sparse
from vis_sparse.executor.transformers_internals import CACHE

from ..models import IMAGE, LAYERS, make_batch, make_model, random_plan


def gradients(model, batch):
    model.zero_grad()
    model(**batch.by_ids(), use_cache=False).logits[:, -3:].square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_same_gradients_from_layers_run_twice():
    model = vis_sparse.patch(make_model(), random_plan(800)).train()
    batch, runs = make_batch(model, [(5, IMAGE, 4)]), []
    for layer in model.model.language_model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    expected = gradients(model, batch)
    assert len(runs) == LAYERS
    model.gradient_checkpointing_enable()
    actual = gradients(model, batch)
    assert len(runs) == 3 * LAYERS
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)


def test_no_cache_under_checkpointing():
    model = vis_sparse.patch(make_model(), random_plan(801)).train()
    model.gradient_checkpointing_enable()
    inputs = make_batch(model, [(5, IMAGE, 4)]).by_ids()
    with pytest.warns(UserWarning, match="use_cache"):
        assert model(**inputs, use_cache=True).past_key_values is None
    with pytest.raises(vis_sparse.PatchError, match=f"{CACHE}: got a cache"):
        model(**inputs, past_key_values=DynamicCache())
