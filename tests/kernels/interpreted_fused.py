"""The fused kernels in Triton's interpreter against their torch form in float64 (run by `test_fused.py`)."""

import pytest
import torch

from vis_sparse.kernels import fused, fused_launches

from .fused_cases import HEAD_DIMS, WIDTHS, largest_error, rotation, rows


@pytest.mark.parametrize("width", WIDTHS)
def test_norm(width):
    for index in (None, torch.tensor([4, 0, 4])):
        x, weight = rows(6, width), rows(1, width)[0]
        assert largest_error("rms_norm", fused_launches, x, weight, 1e-5, index) <= 1e-5


def test_norm_of_few_and_many_rows(monkeypatch):
    monkeypatch.setattr(fused_launches, "_GRADIENT_PROGRAMS", 3)
    for count in (0, 1, 7):
        assert largest_error("rms_norm", fused_launches, rows(count, 48), rows(1, 48)[0], 1e-5) <= 1e-5


@pytest.mark.parametrize(
    "deltas, start, normed", [([6], 0, None), ([2, 4], 0, 2), ([3], 2, 6), ([0, 3], 3, 1), ([], 0, 4)]
)
def test_sum_and_norm(deltas, start, normed):
    x, weight = rows(6, 40), rows(1, 40)[0]
    added = [rows(count, 40, seed=seed) for seed, count in enumerate(deltas, 1)]
    with torch.no_grad():
        expected = fused.add_rms_norm(x.double(), [d.double() for d in added], weight.double(), 1e-5, start, normed)
        changed = x.clone()
        found = fused_launches.add_rms_norm(changed, added, weight, 1e-5, start, normed)
    assert found[0] is changed
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_sum_and_norm_with_gradients():
    """x is not changed where a backward pass may need it."""
    x, delta, weight = rows(5, 24).requires_grad_(), rows(2, 24, seed=1).requires_grad_(), rows(1, 24, seed=2)[0]
    before = x.detach().clone()
    new, normed = fused_launches.add_rms_norm(x, [delta], weight, 1e-5, 3)
    found = torch.autograd.grad((new * normed).sum(), (x, delta))
    wide = [t.detach().double().requires_grad_() for t in (x, delta)]
    new, normed = fused.add_rms_norm(wide[0], [wide[1]], weight.double(), 1e-5, 3)
    for ours, theirs in zip(found, torch.autograd.grad((new * normed).sum(), wide)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("head_dim, width", HEAD_DIMS)
def test_rotation(head_dim, width, with_norm):
    x = rows(3, 11, head_dim).transpose(0, 1)[:, 1:]  # strides of a slice
    weight = rows(1, head_dim, seed=5)[0] if with_norm else None
    assert largest_error("rotate", fused_launches, x, *rotation(11, width), weight, 1e-6) <= 1e-5


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("heads, units", [(4, (0, 1, 2, 3)), (10, (2, 0)), (None, (1,)), (3, None)])
@torch.no_grad()
def test_rotation_into_a_store(heads, units, with_norm):
    head_dim, count, kv_heads = 24, 5, 4
    query = None if heads is None else rows(count, heads, head_dim)
    key, value = rows(count, kv_heads, head_dim, seed=1), rows(count, 2 * kv_heads, head_dim, seed=2)[:, ::2]
    norm = fused.HeadNorm(rows(1, head_dim)[0], rows(1, head_dim, seed=4)[0], 1e-6) if with_norm else None
    places = torch.tensor([8, 1, 0, 5, 7], dtype=torch.int32)
    index = (None, None) if units is None else (places, torch.tensor(units, dtype=torch.int32))
    held = kv_heads if units is None else len(units)
    found = []
    for module, dtype in ((fused_launches, torch.float32), (fused, torch.float64)):
        stores = [torch.full((9, held, head_dim), 7.0, dtype=dtype) for _ in range(2)]
        slots = fused.Slots(*stores, *index)
        tensors = [None if t is None else t.to(dtype) for t in (query, key, value, *rotation(count, 16))]
        own = None if norm is None else fused.HeadNorm(norm.query.to(dtype), norm.key.to(dtype), norm.eps)
        found.append([module.rotate_into(*tensors, slots, own), *stores])
    for ours, theirs in zip(*found):
        if theirs is None:
            assert ours is None and heads is None
        else:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_gate(width):
    both = rows(4, 2 * width)
    gate, up = both[:, :width], both[:, width:]
    assert largest_error("silu_mul", fused_launches, gate, up) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
def test_half_precision(dtype):
    """Rounded once: no worse than torch, which rounds after every step. (The interpreter cuts bfloat16 off.)"""
    x, weight = rows(6, 96).to(dtype), rows(1, 96)[0].to(dtype)
    expected = fused.rms_norm(x.double(), weight.double(), 1e-5)
    ours, torchs = (module.rms_norm(x, weight, 1e-5).double() - expected for module in (fused_launches, fused))
    assert ours.abs().max() <= torchs.abs().max()
