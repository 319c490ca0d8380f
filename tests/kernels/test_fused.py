"""The fused operations without a GPU: their torch form against written-out mathematics, and the kernels interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vis_sparse.kernels import fused, fused_operations

from .fused_cases import largest_error, rotation, rows

ROOT = Path(__file__).parents[2]


def test_norm_is_torchs():
    x, weight = rows(5, 48).double(), rows(1, 48)[0].double()
    expected = nn.functional.rms_norm(x, (48,), weight, 1e-5)
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5), expected)
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5, torch.tensor([3, 3, 0])), expected[[3, 3, 0]])


def test_sum_and_norm_change_the_rows_they_name():
    x, weight = rows(6, 8), rows(1, 8)[0]
    added = [rows(2, 8, seed=1), rows(1, 8, seed=2)]
    expected = x.clone()
    expected[2:5] += torch.cat(added)
    new, normed = fused.add_rms_norm(x, added, weight, 1e-5, start=2, normed=4)
    assert new is x and torch.equal(x, expected)
    torch.testing.assert_close(normed, fused.rms_norm(expected[:4], weight, 1e-5))


@pytest.mark.parametrize("head_dim, width", [(8, 8), (12, 8)])
def test_rotation_turns_pairs_of_columns(head_dim, width):
    """(a, b), half a width apart, become (a cos - b sin, b cos + a sin); the rest of a head stays."""
    x, (cos, sin) = rows(4, 3, head_dim), rotation(4, width)
    half = width // 2
    a, b, cosine, sine = x[..., :half], x[..., half:width], cos[:, None, :half], sin[:, None, half:]
    expected = torch.cat([a * cosine - b * sine, b * cosine + a * sine, x[..., width:]], -1)
    torch.testing.assert_close(fused.rotate(x, cos, sin), expected)


def test_rotation_into_a_store_fills_the_slots_it_names():
    query, key, value = rows(3, 4, 8), rows(3, 2, 8, seed=1), rows(3, 2, 8, seed=2)
    stores = [torch.full((6, 2, 8), 5.0) for _ in range(2)]
    places, units = torch.tensor([4, 0, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    cos, sin = rotation(3, 8)
    out = fused.rotate_into(query, key, value, cos, sin, fused.Slots(*stores, places, units))
    torch.testing.assert_close(out, fused.rotate(query, cos, sin))
    torch.testing.assert_close(stores[0][[4, 0, 2]], fused.rotate(key, cos, sin)[:, [1, 0]])
    assert torch.equal(stores[1][[4, 0, 2]], value[:, [1, 0]])
    assert all((store[[1, 3, 5]] == 5.0).all() for store in stores)


@torch.no_grad()
def test_rotation_into_a_store_looks_at_no_value():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in (rows(3, 4, 8), rows(3, 2, 8), rows(3, 2, 8), *rotation(3, 8))]
        stores = [mode.from_tensor(torch.zeros(6, 2, 8)) for _ in range(2)]
        index = [mode.from_tensor(torch.arange(n, dtype=torch.int32)) for n in (3, 2)]
        assert fused.rotate_into(*tensors, fused.Slots(*stores, *index)).shape == (3, 4, 8)


def test_gate_is_torchs():
    gate, up = rows(3, 10), rows(3, 10, seed=1)
    torch.testing.assert_close(fused.silu_mul(gate, up), nn.SiLU()(gate) * up)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("rms_norm", (rows(3, 5), rows(1, 5)[0], 1e-5)),
        ("rotate", (rows(3, 2, 8), *rotation(3, 6), rows(1, 8)[0], 1e-6)),
        ("silu_mul", (rows(2, 5), rows(2, 5, seed=1))),
    ],
)
def test_torch_form_in_float32(name, arguments):
    assert largest_error(name, fused, *arguments) <= 1e-5


def test_cpu_tensors_get_the_torch_form():
    assert fused_operations(torch.zeros(1)) is fused


def test_gpu_tensors_get_the_kernels(monkeypatch):
    pytest.importorskip("triton")
    from vis_sparse.kernels import fused_launches

    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

    assert fused_operations(OnGpu) is fused_launches
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert fused_operations(OnGpu) is fused
    monkeypatch.undo()
    OnGpu.dtype = torch.float64
    assert fused_operations(OnGpu) is fused


@pytest.mark.slow
def test_interpreted():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted_fused.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
