"""Which backend runs, what every backend computes on its own, and how much of it."""

import numpy as np
import pytest
import torch

from vis_sparse.cost.pairs import lane_pairs, near_pairs
from vis_sparse.kernels import flex, get_backend, reference, tables, tiled, tilings
from vis_sparse.kernels.patterns import VisualPattern, visible
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.layout.packing import Coordinates, pack
from vis_sparse.plans.layer_plan import Neighborhood

from .cases import CPU, LAYOUTS, PATTERNS, errors, inputs, text_pattern, visual_pattern

BLIND = (True, False, True)


def test_auto_without_a_gpu_is_torch(monkeypatch):
    monkeypatch.delenv("VIS_SPARSE_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_backend().name == "torch"


def test_environment_chooses_for_auto_only(monkeypatch):
    monkeypatch.setenv("VIS_SPARSE_BACKEND", "reference")
    assert get_backend("auto").name == "reference"
    assert get_backend("torch").name == "torch"
    monkeypatch.setenv("VIS_SPARSE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="got 'cuda', expected auto, reference, torch, flex, triton"):
        get_backend()


def test_triton_without_a_gpu_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="no CUDA or ROCm device"):
        get_backend("triton")
    monkeypatch.setattr("vis_sparse.kernels.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="package triton is missing"):
        get_backend("triton")


def test_auto_with_a_gpu_keeps_other_tensors_on_torch(monkeypatch):
    """A model patched before it is moved, and float64: what the kernels don't take."""
    pytest.importorskip("triton")
    monkeypatch.delenv("VIS_SPARSE_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backend = get_backend()
    pattern = visual_pattern("primes", PATTERNS["near"])
    tensors = inputs(pattern, 2, 1, 8)
    expected = tiled.visual_attention(*tensors, pattern, 1.0)
    assert torch.equal(backend.visual_attention(*tensors, pattern, 1.0), expected)


@pytest.mark.parametrize("thinned", [False, True], ids=["whole", "thinned"])
@pytest.mark.parametrize(
    "backend, layout",
    [pytest.param(tiled, layout, id=f"torch-{layout}") for layout in LAYOUTS]
    + [
        pytest.param(flex, layout, id=f"flex-{layout}", marks=() if layout == "frames" else pytest.mark.slow)
        for layout in LAYOUTS
    ],
)
def test_backends_are_the_reference(backend, layout, thinned):
    """Forward and gradients; of FlexAttention, which has none on a CPU, the eager forward."""
    exact = {"gradients": False} if backend is flex else {}
    dtype = torch.float64 if backend is flex else torch.float32
    for attention in PATTERNS.values():
        pattern = visual_pattern(layout, attention, thinned=thinned)
        found = errors(backend, pattern, inputs(pattern, 4, 2, 8, dtype), **exact)
        assert max(found.values()) <= 1e-5, (attention, found)
    for blind in (None, BLIND):
        pattern = text_pattern(layout, blind, thinned=thinned)
        found = errors(backend, pattern, inputs(pattern, 3, 1, 8, dtype), **exact)
        assert max(found.values()) <= 1e-5, (blind, found)


@pytest.mark.slow
@torch.no_grad()
def test_flex_compiles():
    pattern = visual_pattern("ragged", PATTERNS["near"])
    assert max(errors(flex, pattern, inputs(pattern, 2, 1, 16), gradients=False).values()) <= 1e-5


@pytest.mark.parametrize("blind", [None, BLIND])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mass_is_the_softmax_on_visual_keys(layout, blind):
    pattern = text_pattern(layout, blind)
    query, key, _ = (t.detach().double() for t in inputs(pattern, 3, 1, 8))
    scores = torch.einsum("bqhd,bsd->bhqs", query, key[:, :, 0])
    allowed = torch.ones_like(scores, dtype=torch.bool) if pattern.mask is None else pattern.mask.allowed
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    expected = (weights * pattern.is_visual[:, None, None]).sum(-1).transpose(1, 2)
    for module in (reference, tiled):
        torch.testing.assert_close(module.attention_mass(query, key, pattern, 1.0), expected)


def test_reference_has_the_gradients_of_its_values():
    for pattern in (visual_pattern("1x1", PATTERNS["near"]), text_pattern("1x1", BLIND[:2])):
        name = "text_attention" if hasattr(pattern, "blind") else "visual_attention"
        tensors = inputs(pattern, 2, 1, 3, torch.float64)
        assert torch.autograd.gradcheck(lambda *t, p=pattern, n=name: getattr(reference, n)(*t, p, 0.5), tensors)


def grid_pattern(side: int, attention) -> tuple[VisualPattern, int]:
    """One square grid after the 35 text tokens of LLaVA's prompt, and the pairs that it reads."""
    layout = VisualLayout.from_grids([[(35, (1, side, side))]])
    packed = pack(layout, 35 + side * side)
    pairs = near_pairs(attention, layout) + lane_pairs(layout, 35).visual_text
    return VisualPattern(attention, packed.visual, packed.slots(), CPU), pairs


@pytest.mark.parametrize("radius, torch_bound, triton_bound", [(2, 2.5, 1.7), (7, 1.8, 1.35)])
def test_executed_over_ideal_pairs(radius, torch_bound, triton_bound):
    pattern, ideal = grid_pattern(48, Neighborhood(radius, "both"))
    assert 1 <= pattern.tiles.pairs / ideal <= torch_bound
    assert 1 <= tables.near_tables(pattern, 8, 64).pairs / ideal <= triton_bound


def test_work_of_tiles_is_linear_in_tokens():
    near = Neighborhood(3)
    of_side = {side: grid_pattern(side, near)[0].tiles.pairs / side**2 for side in (24, 96)}
    assert of_side[96] <= 1.3 * of_side[24]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_the_causal_rule(layout):
    """Every pair that the tables of runs let through is read, and no other is."""
    for pattern in (text_pattern(layout), visual_pattern(layout, "full")):
        table = tables.run_tables(pattern, 4)
        runs, offsets = table.runs.numpy(), table.offsets.numpy()
        flat = pattern.slots
        found = np.zeros((len(table.columns), *flat.sample.shape), dtype=bool)
        for sample, first, count, _, _ in table.blocks.numpy():
            for slot, length, column, _ in runs[offsets[sample] : offsets[sample + 1]]:
                for row in range(first, first + count):
                    found[row, sample, slot : slot + max(min(length, table.columns[row] - column + 1), 0)] = True
        if isinstance(pattern, VisualPattern):
            expected = visible("full", pattern.query.take(np.s_[:, None, None]), Coordinates(*(a[None] for a in flat)))
        else:
            samples = np.repeat(np.arange(len(flat.sample)), pattern.query_columns.shape[1])
            columns = pattern.query_columns.reshape(-1, 1, 1)
            expected = flat.valid & (flat.column <= columns) & (flat.sample == samples[:, None, None])
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_programs_with_most_work_start_first(layout):
    for pattern in (text_pattern(layout), visual_pattern(layout, "full")):
        table = tables.run_tables(pattern, 4)
        runs, offsets = table.runs.numpy(), table.offsets.numpy()
        walked = [
            sum(np.clip(last - runs[offsets[b] : offsets[b + 1], 2] + 1, 0, runs[offsets[b] : offsets[b + 1], 1]))
            for b, _, _, _, last in table.blocks.numpy()
        ]
        assert walked == sorted(walked, reverse=True)
        keys = tables.key_blocks(pattern, 4).numpy()
        assert (np.diff(keys[:, 6] - keys[:, 5]) <= 0).all()


@pytest.mark.parametrize("thinned", [False, True], ids=["whole", "thinned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_keys_are_written_once(layout, thinned):
    """Every slot, padding too, by one program: the gradients are allocated, not filled."""
    attended = [PATTERNS["near"], "full"] if not thinned else ["full"]
    for pattern in [text_pattern(layout, thinned=thinned)] + [
        visual_pattern(layout, a, thinned=thinned) for a in attended
    ]:
        written = np.zeros(pattern.slots.valid.shape, dtype=int)
        for sample, slot, count, *_ in tables.key_blocks(pattern, 4).numpy():
            written[sample, slot : slot + count] += 1
        if isinstance(pattern, VisualPattern) and pattern.attention != "full":
            segments, _ = tables._segments(pattern)
            tiles, (height, width, *_) = tables.key_tiles(pattern, 8, 4)
            for segment, t, y, x in tiles.numpy():
                sample, _, slot, frames, rows, columns, _, _ = segments[segment]
                own = written[sample, slot : slot + frames * rows * columns].reshape(frames, rows, columns)
                own[t, y : y + height, x : x + width] += 1
        assert (written == 1).all()


@pytest.mark.parametrize("attention", [p for p in PATTERNS.values() if p != "full"], ids=str)
def test_tilings_count_what_the_rule_says(attention):
    """The box of a tile against the keys that its queries read one by one; no step without a core is called one."""
    for height, width in ((7, 11), (19, 1), (1, 37)):
        pattern = VisualPattern(attention, *_coordinates(height, width), CPU)
        segments, runs = tables._segments(pattern)
        tiling = tilings.best_tiling(attention, segments, runs, 8, 4)
        read = pattern.dense_mask.allowed.numpy().reshape(height, width, height, width)
        sizes = []
        for y in range(0, height, tiling.tile[0]):
            for x in range(0, width, tiling.tile[1]):
                tile = read[y : y + tiling.tile[0], x : x + tiling.tile[1]].any((0, 1))
                rows, columns = np.flatnonzero(tile.any(1)), np.flatnonzero(tile.any(0))
                sizes.append((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
        # under "causal" the last row of a box ends before the box does
        over = tiling.entries - np.array(sizes)
        assert (over == 0).all() if attention.direction == "both" else (over >= 0).all()
        assert tiling.walked >= 8 * tiling.entries.sum()
        if attention.radius == 0:
            assert not tiling.has_core or attention.stride > 1


def _coordinates(height: int, width: int) -> tuple[Coordinates, Coordinates]:
    packed = pack(VisualLayout.from_grids([[(0, (1, height, width))]]), height * width)
    return packed.visual, packed.slots()
