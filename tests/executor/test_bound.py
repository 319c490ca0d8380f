"""Modules as lanes have bound them: a change is noticed at the next call, and only a change."""

import copy

import pytest
import torch
from torch import nn

import vis_sparse
from vis_sparse.plans.plan import VisualPlan

from ..models import IMAGE, LAYERS, make_batch, make_model, run
from .test_kept_cuts import SCATTERED, layers


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Marked(torch.nn.Parameter):
    pass


def replace_up(model):
    mlp = layers(model)[1].mlp
    mlp.up_proj = copy.deepcopy(mlp.up_proj)


def change_class(model):
    layers(model)[1].self_attn.v_proj.__class__ = Doubled


def hook_norm(model):
    layers(model)[0].post_attention_layernorm.register_forward_hook(lambda module, args, out: 2 * out)


def own_forward(model):
    norm = layers(model)[2].input_layernorm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def other_weight(model):
    linear = layers(model)[2].mlp.down_proj
    linear.weight = Marked(linear.weight.data)


CHANGES = {
    "replaced": replace_up, "class": change_class, "hook": hook_norm, "forward": own_forward, "weight": other_weight,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change):
    model = vis_sparse.patch(make_model(), SCATTERED, verify=False)
    state = model.model.language_model._vis_sparse
    executor = state.executors[state.default]
    before = executor.bound()
    assert executor.bound() is before, "nothing changed"
    CHANGES[change](model)
    after = executor.bound()
    assert after is not before and executor.bound() is after


@pytest.mark.parametrize("change", ["hook", "forward", "class"])
@torch.no_grad()
def test_what_was_changed_after_a_call_is_obeyed(change):
    """In fp32, where norms are torch's own until somebody listens to them."""
    model, reference = (make_model(dtype=torch.float32) for _ in range(2))
    batch = make_batch(reference, [(3, IMAGE, 4)])
    batch.pixel_values.data = batch.pixel_values.float()
    vis_sparse.patch(model, VisualPlan.dense(LAYERS))
    run(model, batch)
    for each in (model, reference):
        CHANGES[change](each)
    torch.testing.assert_close(run(model, batch)[0], run(reference, batch)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_norms_run_as_torchs_own_only_where_they_compute_it():
    def norms(dtype):
        model = vis_sparse.patch(make_model(dtype=dtype), "dense")
        state = model.model.language_model._vis_sparse
        return state.executors[state.default].decoder.layers[0].norms

    assert set(norms(torch.float32)) == {"input_norm", "post_norm"}
    assert not norms(torch.float64), "transformers' norms compute in fp32"


def test_a_copy_binds_its_own_modules():
    model = vis_sparse.patch(make_model(), VisualPlan.dense(LAYERS))
    batch = make_batch(model, [(3, IMAGE, 4)])
    with torch.no_grad():
        before = run(model, batch)[0]
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(run(model, batch)[0], before) and not run(copied, batch)[0].any()
