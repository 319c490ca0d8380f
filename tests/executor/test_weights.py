"""`product`: every routine it may choose gives `linear`'s numbers, and the FLOPs and gradients are seen."""

from math import inf

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vis_sparse.eval.launches import Launches
from vis_sparse.executor import weights
from vis_sparse.executor.weights import product

IN, OUT = 40, 24


@pytest.fixture(autouse=True, params=["small products as linear", "every product as a large one"])
def size(request, monkeypatch):
    """Products of these sizes are too small for oneDNN's routine, but where nothing is."""
    if request.param.startswith("every"):
        for name, value in (("FROM", 1), ("WEIGHTS", 0), ("ROWS", inf)):
            monkeypatch.setattr(weights, f"_ONE_DNN_{name}", value)


@pytest.mark.parametrize(
    "rows, least, most, chosen",
    [(64, 0, 64, True), (65, 0, 64, False), (65, 0, inf, True), (3, 0, inf, False), (64, 2**19, 64, False)],
)
@torch.no_grad()
def test_one_dnn_runs_large_products_of_few_rows(rows, least, most, chosen, monkeypatch):
    for name, value in (("FROM", 2**20), ("WEIGHTS", least), ("ROWS", most)):
        monkeypatch.setattr(weights, f"_ONE_DNN_{name}", value)
    x, weight = torch.randn(rows, 512), torch.randn(512, 512)
    with Launches() as counted:
        product(x, weight)
    assert (counted.ops["mkldnn._linear_pointwise.default"] == 1) == chosen, counted.ops


def contiguous(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width)


def columns(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width + 5)[:, 2:-3]


def leading_rows(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows + 3, width)[:rows]


@pytest.mark.parametrize("mkldnn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make_weight", [contiguous, columns, leading_rows])
@pytest.mark.parametrize("make_x", [contiguous, columns, leading_rows])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 65])
@torch.no_grad()
def test_is_linear(rows, make_x, make_weight, bias, mkldnn):
    x, weight = make_x(rows, IN), make_weight(OUT, IN)
    bias = torch.randn(OUT) if bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = mkldnn and enabled
    try:
        with FlopCounterMode(display=False) as counter:
            out = product(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = enabled
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    assert counter.get_total_flops() == 2 * rows * IN * OUT


def test_gradients_reach_input_weight_and_bias():
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((20, IN), (OUT, IN), (OUT,)))
    grads = torch.autograd.grad(product(x, weight, bias).square().sum(), (x, weight, bias))
    expected = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (x, weight, bias))
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_autocast_is_obeyed():
    x, weight = torch.randn(20, IN), torch.randn(OUT, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight).dtype == F.linear(x, weight).dtype == torch.bfloat16
