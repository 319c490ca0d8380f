"""`patch` looks at what a decoder does: in its last layer, in a decode step; and leaves no trace."""

import pytest
import torch

import vis_sparse
from vis_sparse.patches import verify
from vis_sparse.plans.plan import VisualPlan

from ..models import IMAGE, LAYERS, make_batch, make_model, random_plan


def changed(model, when):
    """The model with attention that counts twice where `when(module, hidden)`."""

    class Changed(type(model.model.language_model.layers[0].self_attn)):
        def forward(self, hidden_states, *args, **kwargs):
            out, weights = super().forward(hidden_states, *args, **kwargs)
            return (2 * out if when(self, hidden_states) else out), weights

    for layer in model.model.language_model.layers:
        layer.self_attn.__class__ = Changed
    return model


def test_a_decode_step_that_differs_is_seen():
    model = changed(make_model(), lambda module, hidden: hidden.shape[1] == 1)
    with pytest.raises(vis_sparse.PatchError, match="differs from its lanes.*or in the decode step"):
        vis_sparse.patch(model, "dense")
    assert vis_sparse.inspect(vis_sparse.patch(model, "dense", verify=False)) is not None


def test_a_decode_step_that_differs_in_one_kind_of_layer_is_seen():
    model = changed(make_model(num_hidden_layers=9), lambda module, hidden: module.is_odd and hidden.shape[1] == 1)
    for index, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.is_odd = index == 6
    with pytest.raises(vis_sparse.PatchError, match="differs from its lanes.*or in the decode step"):
        vis_sparse.patch(model, "dense")


def test_a_last_layer_that_differs_is_seen():
    model = changed(make_model(num_hidden_layers=9), lambda module, hidden: module.layer_idx == 8)
    with pytest.raises(vis_sparse.PatchError, match="first in layer 8"):
        vis_sparse.patch(model, "dense")


def test_the_check_leaves_the_mode_as_it_was():
    model = make_model().train()
    model.model.language_model.layers[1].eval()
    before = [module.training for module in model.modules()]
    vis_sparse.patch(model, "dense")
    assert [module.training for module in model.modules()] == before


def test_the_check_leaves_rotary_frequencies_as_they_were():
    """Long positions, at which it looks, have others."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=64)
    model = make_model(rope_parameters=dict(rope_type="longrope", rope_theta=10_000.0, **factors))
    rotary = model.model.language_model.rotary_emb
    before = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    vis_sparse.patch(model)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in rotary.named_buffers())


@torch.no_grad()
def test_a_patch_that_fails_leaves_the_earlier_one(monkeypatch):
    model = vis_sparse.patch(make_model(), random_plan(3))
    batch = make_batch(model, [(3, IMAGE, 4)])
    expected = model(**batch.by_ids()).logits
    monkeypatch.setattr(verify, "_known", {})
    monkeypatch.setattr(verify, "_in_lanes", lambda *_: 1 / 0)
    with pytest.raises(vis_sparse.PatchError, match="lanes fail: division by zero"):
        vis_sparse.patch(model, VisualPlan.dense(LAYERS))
    assert torch.equal(model(**batch.by_ids()).logits, expected)
