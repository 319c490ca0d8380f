"""Triton kernels in Triton's interpreter against the float64 reference. `test_triton.py` runs this file in processes
of its own: whether kernels are interpreted is decided when they are defined, by TRITON_INTERPRET."""

import numpy as np
import pytest
import torch
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from vis_sparse.kernels import reference, tables, tiled, tilings, triton_backend, tuning
from vis_sparse.kernels.patterns import BlindHeads, StepMask, StepPattern, VisualPattern
from vis_sparse.kernels.tuning import Blocks
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.layout.packing import pack
from vis_sparse.plans.layer_plan import Neighborhood

from .cases import CPU, LAYOUTS, PATTERNS, errors, inputs, text_pattern, visual_pattern
from .executor import largest_difference, largest_gradient_difference

# small shapes: the interpreter takes milliseconds for every block
HEADS = {"MHA": (2, 2), "GQA": (3, 1)}
BLIND = {"none": None, "some": (True, False, True), "all": (True,) * 3}
TEXTS = [*((layout, "some") for layout in LAYOUTS), ("ragged", "none"), ("ragged", "all")]


def visual_cases():
    """Every layout and every pattern, not every pair of them, with either kind of heads."""
    layouts, patterns = list(LAYOUTS), list(PATTERNS)
    chosen = {(layouts[i % len(layouts)], pattern) for i, pattern in enumerate(patterns)}
    chosen |= {("ragged", pattern) for pattern in patterns}
    chosen |= {(layout, "near") for layout in layouts}
    return [(*case, list(HEADS)[i % 2]) for i, case in enumerate(sorted(chosen))]


@pytest.mark.parametrize("layout, pattern, heads", visual_cases())
def test_visual(layout, pattern, heads):
    pattern = visual_pattern(layout, PATTERNS[pattern])
    found = errors(triton_backend, pattern, inputs(pattern, *HEADS[heads], 16))
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("layout", ["ragged", "frames", "1x1"])
def test_visual_tokens_that_are_left(layout):
    for attention in ("full", PATTERNS["near"]):
        pattern = visual_pattern(layout, attention, thinned=True)
        found = errors(triton_backend, pattern, inputs(pattern, 3, 1, 16))
        assert max(found.values()) <= 1e-5, (attention, found)
    pattern = text_pattern(layout, BLIND["some"], thinned=True)
    found = errors(triton_backend, pattern, inputs(pattern, 3, 1, 16))
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("layout, blind", TEXTS)
def test_text(layout, blind):
    pattern = text_pattern(layout, BLIND[blind])
    found = errors(triton_backend, pattern, inputs(pattern, 3, 3, 16))
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("blind", BLIND)
def test_decode(blind, splits, monkeypatch):
    """A head without any text to read included: the ragged batch's samples begin with padding or an image."""
    monkeypatch.setattr(tuning, "decode_splits", lambda *_: splits)
    for layout in ("ragged", "1xN"):
        for queries in (1, 3):
            pattern = text_pattern(layout, BLIND[blind], queries)
            found = errors(triton_backend, pattern, inputs(pattern, 3, 1, 16), gradients=queries == 3)
            assert max(found.values()) <= 1e-5, found


def step_pattern(kind: str, samples: int, slots: int, heads: int) -> StepPattern:
    """everything: all slots. padded: some of each sample. room: those up to the last in use; behind it lies NaN."""
    generator = torch.Generator().manual_seed(7)
    if kind == "everything":
        return StepPattern(slots, None, None)
    read = torch.rand(samples, slots, generator=generator) < 0.6
    read[0, :-1] = False  # a part of the slots with nothing to read
    if kind == "padded":
        return StepPattern(slots, StepMask(read[:, None, None]), None)
    last = slots - 40
    read[:, last + 1 :] = False
    read[:, last] = True
    blind = BlindHeads(torch.arange(heads) % 2 == 0, torch.arange(slots + 9) < 30)
    return StepPattern(slots, StepMask(read[:, None, None]), blind, torch.tensor([last]))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind", ["everything", "padded", "room"])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (20, 1)])
def test_steps(kind, heads, kv_heads, splits, monkeypatch):
    monkeypatch.setattr(tuning, "decode_splits", lambda *_: splits)
    generator, (samples, slots) = torch.Generator().manual_seed(1), (2, 150)
    query = torch.randn(samples, 1, heads, 16, generator=generator)
    pair = torch.randn(samples, slots, 2 * kv_heads, 16, generator=generator)
    pattern = step_pattern(kind, samples, slots, heads)
    key, value = pair[:, :, :kv_heads], pair[:, :, kv_heads:]
    expected = tiled.text_attention(query.double(), key.double(), value.double(), pattern, 0.25)
    if pattern.last is not None:
        pair[:, int(pattern.last) + 1 :] = float("nan")
    given = triton_backend.text_attention(query, key, value, pattern, 0.25)
    assert float((given - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_widths(head_dim):
    for pattern in (visual_pattern("ragged", PATTERNS["near"]), text_pattern("ragged")):
        found = errors(triton_backend, pattern, inputs(pattern, 2, 1, head_dim))
        assert max(found.values()) <= 1e-5, found


@pytest.fixture
def true_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as its bits: it would multiply those, and cuts off where a GPU rounds."""
    product, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def of_values(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *args):
        return product(self, of_values(a), of_values(b), *args)

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(bits, tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, true_bfloat16):
    """No more than twice the error of torch's own attention."""
    for pattern in (visual_pattern("primes", PATTERNS["causal"]), text_pattern("long text")):
        tensors = inputs(pattern, 2, 1, 32, dtype)
        ours, torchs = (errors(module, pattern, tensors) for module in (triton_backend, tiled))
        assert all(ours[part] <= 2 * torchs[part] for part in ours), (ours, torchs)


@pytest.mark.parametrize("positions, keys", [(64, 64), (16, 32), (4, 16)])
def test_tile_sizes(positions, keys, monkeypatch):
    """With a loop for steps in the core of a box wherever there is one."""
    monkeypatch.setattr(tuning, "near_blocks", lambda *_: Blocks(positions, keys, 4, 1))
    monkeypatch.setattr(tilings, "_CORE_SHARE", 0)
    for name in ("causal", "aligned"):
        pattern = visual_pattern("ragged", PATTERNS[name])
        found = errors(triton_backend, pattern, inputs(pattern, 3, 1, 16))
        assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("direction", ["both", "causal"])
def test_tile_core(direction, monkeypatch):
    """Small steps in wide windows: of every frame, some in the core of a box and some around it."""

    def small(near, segments, runs, positions, entries, of_keys=False):
        grids = [(*map(int, segment[3:6]), 0) for segment in segments]
        tiling = tilings._tiling(near, grids, (2, 2), (2, 2), of_keys)
        assert tiling.has_core
        return tiling

    monkeypatch.setattr(tilings, "_CORE_SHARE", 0)
    monkeypatch.setattr(tables, "best_tiling", small)
    monkeypatch.setattr(tuning, "near_blocks", lambda *_: Blocks(4, 4, 4, 1))
    monkeypatch.setattr(tuning, "key_gradient_blocks", lambda *_: Blocks(4, 4, 4, 1))
    packed = pack(VisualLayout.from_grids([[(1, (2, 5, 7))]]), 71)
    pattern = VisualPattern(Neighborhood(3, direction, frames=1), packed.visual, packed.slots(), CPU)
    found = errors(triton_backend, pattern, inputs(pattern, 1, 1, 16))
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("splits", [2, 3])
def test_text_gradients_in_parts(splits, monkeypatch):
    monkeypatch.setattr(tuning, "key_gradient_splits", lambda *_: splits)
    for pattern in (visual_pattern("ragged", PATTERNS["near"]), text_pattern("long text", (True, False, True))):
        found = errors(triton_backend, pattern, inputs(pattern, 3, 1 if splits == 2 else 3, 16))
        assert max(found.values()) <= 1e-5, found


def rounded_to_tf32(x):
    return ((x.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def three_tf32(monkeypatch):
    """The interpreter multiplies float32 as it is; here as a GPU does under "tf32x3"."""
    product, used = InterpreterBuilder.create_dot, []

    def create_dot(self, a, b, d, precision, *args):
        if a.data.dtype != np.float32:
            return product(self, a, b, d, precision, *args)
        used.append(precision)
        high = [rounded_to_tf32(np.ascontiguousarray(t.data)) for t in (a, b)]
        low = [rounded_to_tf32(np.ascontiguousarray(t.data) - part) for t, part in zip((a, b), high)]
        found = low[0] @ high[1] + high[0] @ low[1] + high[0] @ high[1] + d.data
        return TensorHandle(found.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(tuning, "precision", lambda *_: "tf32x3")
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return used


def test_text_in_tf32x3(three_tf32):
    """Float32 on tensor cores: three products of TF32 stay within what float32 is held to, where one would not."""
    for pattern in (visual_pattern("primes", PATTERNS["near"]), text_pattern("long text")):
        found = errors(triton_backend, pattern, inputs(pattern, 2, 1, 64))
        assert max(found.values()) <= 1e-5, found
    assert three_tf32 and {str(precision) for precision in three_tf32} != {"IEEE"}


@pytest.mark.parametrize("layout, blind", TEXTS)
def test_mass(layout, blind):
    pattern = text_pattern(layout, BLIND[blind])
    query, key, _ = inputs(pattern, 3, 1, 16)
    expected = reference.attention_mass(query.double(), key.double(), pattern, 0.25)
    assert (triton_backend.attention_mass(query, key, pattern, 0.25) - expected).abs().max() <= 1e-6


def test_operators_are_registered_well():
    """Schemas, shapes for tracing, and gradients that trace: what torch.compile relies on."""
    captured = {}
    pattern = visual_pattern("ragged", PATTERNS["near"])
    operations = triton_backend.triton_ops
    for name in ("near", "runs"):
        original = getattr(operations, name)

        def keep(*args, name=name, original=original):
            captured[name] = args
            return original(*args)

        setattr(operations, name, keep)
        try:
            attended = pattern if name == "near" else text_pattern("ragged")
            tensors = inputs(attended, 3, 1, 16)
            call = triton_backend.visual_attention if name == "near" else triton_backend.text_attention
            call(*tensors, attended, 0.25)
        finally:
            setattr(operations, name, original)
        torch.library.opcheck(original, captured[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("scenario, semantics", [("ragged", "exclude"), ("left-chunks", "zero")])
@torch.no_grad()
def test_executor(scenario, semantics):
    """A float32 model: its own rounding, not the kernels' alone."""
    assert largest_difference("triton", scenario, "llama-gqa", semantics, torch.float32) <= 1e-4


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
def test_gradients_of_a_model(semantics):
    assert largest_gradient_difference("triton", "llama-gqa", semantics) <= 1e-5
