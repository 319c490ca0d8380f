"""The Triton kernels on a GPU, in the shapes of real models: `python -m pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch

import vis_sparse
from vis_sparse.kernels import fused, fused_operations, get_backend, reference, tiled

from ..models import IMAGE, extended, make_batch, make_model, random_plan, run
from .cases import LAYOUTS, PATTERNS, errors, inputs, text_pattern, visual_pattern
from .executor import largest_difference
from .fused_cases import largest_error, rotation, rows

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


FUSED = {
    "rms_norm": (rows(300, 3584), rows(1, 3584, seed=1)[0], 1e-5),
    "rotate": (rows(40, 28, 128), *rotation(40, 128), rows(1, 128, seed=1)[0], 1e-6),
    "silu_mul": (rows(40, 9000), rows(40, 9000, seed=1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused(name, dtype):
    """Rounded once: no worse than torch, which rounds after every step."""
    arguments = [a.to(GPU, dtype) if torch.is_tensor(a) else a for a in FUSED[name]]
    kernels = fused_operations(arguments[0])
    assert kernels is not fused
    bound = 1e-5 if dtype == torch.float32 else 1.5 * largest_error(name, fused, *arguments)
    assert largest_error(name, kernels, *arguments) <= bound


@torch.no_grad()
def test_fused_in_place():
    make = {"device": GPU, "dtype": torch.bfloat16}
    x, deltas = rows(9, 4096).to(**make), [rows(4, 4096, seed=1).to(**make), rows(3, 4096, seed=2).to(**make)]
    weight, key, value = rows(1, 4096)[0].to(**make), rows(9, 4, 128).to(**make), rows(9, 4, 128, seed=3).to(**make)
    index = {"device": GPU, "dtype": torch.int32}
    places, units = torch.randperm(20, **index)[:9], torch.tensor([3, 1], **index)
    found = []
    for module in (fused_operations(x), fused):
        changed, stores = x.clone(), [torch.zeros(20, 2, 128, **make) for _ in range(2)]
        normed = module.add_rms_norm(changed, deltas, weight, 1e-5, 2)[1]
        cos, sin = (t.to(**make) for t in rotation(9, 128))
        query = module.rotate_into(key, key, value, cos, sin, fused.Slots(*stores, places, units))
        found.append((changed, normed, query, *stores))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("seed", [900, 901])
@torch.no_grad()
def test_graphs(seed, padding):
    """CUDA graphs of prompts and steps against a CPU in float64: texts of a bucket, caches side by side, weights that
    move."""
    plan = random_plan(seed)
    reference = vis_sparse.patch(make_model("llama-gqa"), plan)
    model = make_model("llama-gqa", dtype=torch.float32).to(GPU)
    vis_sparse.patch(model, plan, graphs=True)
    held = []
    for number, first in enumerate((5, 9, 2, 5, 7)):
        if number == 3:
            for each in (model, reference):
                weight = each.model.language_model.layers[0].mlp.down_proj.weight
                weight.data = weight.data * 0.5
        batch = make_batch(reference, [(first, IMAGE, 4), (2, IMAGE, 3)], padding, seed=number)
        longer = extended(reference, batch, 3)
        cuts = range(batch.length, longer.length)
        expected = run(reference, longer, cuts)[0]
        named = ("input_ids", "attention_mask", "pixel_values")
        moved = replace(longer, **{name: getattr(longer, name).to(GPU) for name in named})
        moved = replace(moved, pixel_values=moved.pixel_values.float())
        logits, cache = run(model, moved, cuts)
        held.append(cache)
        real = longer.attention_mask.bool()
        assert float((logits.cpu() - expected)[real].abs().max() / expected[real].abs().max()) <= 1e-4
