"""The Triton kernels on a GPU, in the shapes of real models: `python -m pytest -m gpu`."""

import pytest
import torch

from vis_sparse.kernels import get_backend, reference, tiled

from .cases import LAYOUTS, PATTERNS, errors, inputs, text_pattern, visual_pattern
from .executor import largest_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
GPU = torch.device("cuda")
HALF = [torch.float16, torch.bfloat16]


def patterns(layout):
    for thinned in (False, True):
        yield from (visual_pattern(layout, attention, GPU, thinned) for attention in PATTERNS.values())
    yield from (
        text_pattern(layout, blind, queries, GPU) for blind in (None, (True, False) * 2) for queries in (None, 1)
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32(layout, heads):
    triton = get_backend("triton")
    for pattern in patterns(layout):
        assert max(errors(triton, pattern, inputs(pattern, *heads, 64)).values()) <= 1e-5


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("layout", ["ragged", "long text"])
def test_half_precision(layout, head_dim, dtype):
    """No more than twice the error of torch's own attention."""
    triton = get_backend("triton")
    for pattern in patterns(layout):
        tensors = inputs(pattern, 4, 1, head_dim, dtype)
        ours, torchs = (errors(module, pattern, tensors) for module in (triton, tiled))
        assert all(ours[part] <= 2 * torchs[part] for part in ours), (ours, torchs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mass(layout):
    pattern = text_pattern(layout, device=GPU)
    query, key, _ = inputs(pattern, 4, 2, 64)
    expected = reference.attention_mass(query.double(), key.double(), pattern, 0.125)
    assert (get_backend("triton").attention_mass(query, key, pattern, 0.125) - expected).abs().max() <= 1e-6


def test_compiled_call():
    pattern = visual_pattern("ragged", PATTERNS["near"], GPU)
    tensors = [t.detach() for t in inputs(pattern, 4, 2, 64)]
    attend = get_backend("triton").visual_attention
    expected = attend(*tensors, pattern, 0.125)
    torch.testing.assert_close(torch.compile(attend)(*tensors, pattern, 0.125), expected)


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
@pytest.mark.parametrize("scenario", ["decode", "left-chunks", "ragged"])
@torch.no_grad()
def test_executor(scenario, semantics):
    assert largest_difference("triton", scenario, "llama-gqa", semantics, torch.float32, GPU) <= 1e-4
