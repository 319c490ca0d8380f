"""Whose weights may be used directly, and which changes of them are seen."""

import torch
from torch import nn

import vis_sparse
from vis_sparse.patches import unpatched
from vis_sparse.plans.plan import VisualPlan

from ..models import IMAGE, LAYERS, make_batch, make_model, run
from .test_kept_cuts import EXACT, SCATTERED, fresh, layers


@torch.no_grad()
def test_an_edit_of_one_element_is_seen_by_its_version():
    model = vis_sparse.patch(make_model(), SCATTERED)
    batch = make_batch(model, [(3, IMAGE, 4)])
    before = run(model, batch)[0]
    layers(model)[0].mlp.up_proj.weight[0, 1] += 5  # the fingerprint's first elements are those at 0 and 47
    after = run(model, batch)[0]
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, fresh(model, batch), **EXACT)


@torch.no_grad()
def test_copies_that_were_let_go_are_made_again():
    """A conversion that changes nothing lets the copies go; the next prompt needs them."""
    model = vis_sparse.patch(make_model(), SCATTERED)
    batch = make_batch(model, [(3, IMAGE, 4)])
    run(model, batch)
    kept = vis_sparse.inspect(model)["extra_bytes"]
    model.to(torch.float64)
    assert vis_sparse.inspect(model)["extra_bytes"] == 0 < kept
    run(model, batch)
    assert vis_sparse.inspect(model)["extra_bytes"] == kept


def check_unpatched(model):
    """Lanes that compute everything are the unpatched model."""
    vis_sparse.patch(model, VisualPlan.dense(LAYERS))
    batch = make_batch(model, [(3, IMAGE, 4)])
    logits = run(model, batch)[0]
    with unpatched(model):
        torch.testing.assert_close(logits, run(model, batch)[0], **EXACT)


@torch.no_grad()
def test_a_replaced_forward_is_called():
    """As offloading's hooks do it."""
    model = make_model()
    up = layers(model)[1].mlp.up_proj
    up.forward = lambda x: 2 * nn.Linear.forward(up, x)
    check_unpatched(model)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_a_subclass_is_called():
    model = make_model()
    layers(model)[1].self_attn.v_proj.__class__ = Doubled
    check_unpatched(model)
