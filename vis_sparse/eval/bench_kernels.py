"""Visual attention in every backend against dense attention, FlexAttention and NATTEN."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

TEXT_BEFORE = 35  # of LLaVA's prompt
_CHECKED_ROWS = 64


class Setting(NamedTuple):
    """Grids of one sample, (frames, height, width) each, and the heads of the model that makes them."""

    model: str
    grids: tuple[tuple[int, int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int = 128


SETTINGS = {
    "24x24": Setting("LLaVA-1.5-7B", ((1, 24, 24),), 32, 32),
    "48x48": Setting("LLaVA-NeXT-7B", ((1, 48, 48),), 32, 32),
    "64x64": Setting("Qwen2-VL-7B", ((1, 64, 64),), 28, 4),
    "128x128": Setting("Qwen2-VL-7B", ((1, 128, 128),), 28, 4),
    "8x32x32": Setting("Qwen2-VL-7B", ((8, 32, 32),), 28, 4),
    "16 of 16x16": Setting("InternVL2-8B", ((1, 16, 16),) * 16, 32, 8),
}


class Case:
    """One setting at one batch: inputs, the ways to compute each radius, and what is right."""

    def __init__(self, name: str, batch: int, radii: list[int], direction: str, device, dtype, most_heads: int | None):
        import torch

        from ..cost.pairs import lane_pairs, near_pairs
        from ..kernels.patterns import TextPattern, VisualPattern
        from ..layout.layout import VisualLayout
        from ..layout.packing import pack
        from ..plans.layer_plan import Neighborhood

        setting = SETTINGS[name]
        group = setting.heads // setting.kv_heads
        kv_heads = max(min(setting.heads, most_heads or setting.heads) // group, 1)
        self.heads, self.kv_heads, self.head_dim = kv_heads * group, kv_heads, setting.head_dim
        self.grids = setting.grids
        starts, position = [], TEXT_BEFORE
        for frames, height, width in setting.grids:
            starts.append((position, (frames, height, width)))
            position += frames * height * width
        layout = VisualLayout.from_grids([starts]).expanded(batch)
        packing = pack(layout, position)
        slots = packing.slots()
        rules = {radius: Neighborhood(radius, direction, frames=1) for radius in radii}
        self.patterns = {r: VisualPattern(rule, packing.visual, slots, device) for r, rule in rules.items()}
        ordered = slots.take((slice(None), slots.column[0].argsort()))
        self.dense_pattern = TextPattern(ordered.column, ordered, None, device)
        generator = torch.Generator(device).manual_seed(0)
        make = {"generator": generator, "device": device, "dtype": dtype}
        self.query = torch.randn(layout.num_visual, self.heads, self.head_dim, **make)
        self.key, self.value = (torch.randn(batch, position, kv_heads, self.head_dim, **make) for _ in range(2))
        self.dense_query = torch.randn(batch, position, self.heads, self.head_dim, **make)
        text = lane_pairs(layout, TEXT_BEFORE).visual_text
        self.pairs = {radius: near_pairs(rule, layout) + text for radius, rule in rules.items()}
        self.dense_pairs = batch * position * (position + 1) // 2
        self.scale = self.head_dim**-0.5

    def run(self, way: str, radius: int | None):
        """The output of a backend; of dense attention over all tokens ("dense", no radius); of NATTEN's own pattern."""
        from ..kernels import get_backend

        if way == "dense":
            backend = get_backend("torch")
            return backend.text_attention(self.dense_query, self.key, self.value, self.dense_pattern, self.scale)
        if way == "natten":
            return self._natten(radius)
        pattern = self.patterns[radius]
        return get_backend(way).visual_attention(self.query, self.key, self.value, pattern, self.scale)

    def _natten(self, radius: int):
        """NATTEN's windows are shifted at the border instead of cut off, and there is no text: time only."""
        import natten

        frames, height, width = self.grids[0]
        shape = (-1, height, width) if frames == 1 else (-1, frames, height, width)
        group = self.heads // self.kv_heads
        visual = slice(0, self.key.shape[1] - TEXT_BEFORE)
        keys, values = (t[:, visual].repeat_interleave(group, 2) for t in (self.key, self.value))
        parts = [t.reshape(*shape, self.heads, self.head_dim) for t in (self.query, keys, values)]
        side = 2 * radius + 1
        attend = natten.na2d if frames == 1 else natten.na3d
        sides = (side, side) if frames == 1 else (frames - (frames + 1) % 2, side, side)
        return attend(*parts, kernel_size=tuple(min(s, n) for s, n in zip(sides, shape[1:])))

    def error(self, out, radius: int) -> float:
        """Largest difference of some rows to float64 attention, over the largest value."""
        import numpy as np
        import torch

        from ..kernels.patterns import visible
        from ..kernels.reference import attention
        from ..layout.packing import Coordinates, on_device

        pattern = self.patterns[radius]
        rows = np.linspace(0, len(self.query) - 1, _CHECKED_ROWS).astype(int)
        flat = Coordinates(*(array.reshape(1, -1) for array in pattern.slots))
        allowed = visible(pattern.attention, pattern.query.take(rows[:, None]), flat)
        read = allowed.any(0).nonzero()[0]
        rows, slots = (torch.from_numpy(index).to(out.device) for index in (rows, read))
        key, value = (t.flatten(0, 1).index_select(0, slots)[None].double() for t in (self.key, self.value))
        query = self.query.index_select(0, rows)[None].double()
        expected = attention(query, key, value, on_device(allowed[:, read], out.device), self.scale)[0]
        return float((out.index_select(0, rows).double() - expected).abs().max() / expected.abs().max())


def available_ways(device_type: str) -> list[str]:
    """What can be timed on the device: backends with kernels of their own, dense attention, NATTEN if installed."""
    from importlib.util import find_spec

    natten = ["natten"] if device_type == "cuda" and find_spec("natten") else []
    return ["dense", "torch", "flex", *(["triton"] if device_type == "cuda" else []), *natten]


def bench_kernels(
    settings: list[str],
    batches: list[int],
    radii: list[int],
    *,
    ways: list[str] | None = None,
    direction: str = "both",
    device: str = "cpu",
    dtype: str = "float32",
    most_heads: int | None = None,
    repeats: int = 3,
    on_turn: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """One object for every setting, batch, radius and way: seconds (median and spread of `repeats` rounds in turns),
    useful FLOP/s, share of the theoretical speed-up over dense, and the error against float64.

    The first run of a way, which compiles and builds tables, is not timed. Dense attention has no radius and runs once
    a round.
    """
    import statistics

    import torch

    from .timing import in_turns, machine_facts, timed

    place = torch.device(device)
    ways = ways or available_ways(place.type)
    cases = [(name, batch) for name in settings for batch in batches]
    facts, results = machine_facts(place), []
    for done, (name, batch) in enumerate(cases):
        torch.compiler.reset()  # FlexAttention is compiled for a few shapes at most before it falls back
        case = Case(name, batch, radii, direction, place, getattr(torch, dtype), most_heads)
        rows = [(way, radius) for radius in radii for way in ways]
        turns = list(dict.fromkeys(_turn(way, radius) for way, radius in rows))
        with torch.no_grad():
            errors = {}
            for turn in turns:
                out = case.run(*turn)
                errors[turn] = None if turn[0] in ("dense", "natten") else case.error(out, turn[1])
            times = in_turns(turns, lambda turn, case=case: {"s": timed(lambda: case.run(*turn), place)}, repeats)
        dense = times["dense", None]["s"] if "dense" in ways else None
        for way, radius in rows:
            turn = _turn(way, radius)
            taken = times[turn]["s"]
            seconds = statistics.median(taken)
            pairs = case.dense_pairs if way == "dense" else case.pairs[radius]
            speedup = None if dense is None else statistics.median(a / b for a, b in zip(dense, taken))
            ideal = case.dense_pairs / case.pairs[radius]
            results.append(
                {
                    "setting": name,
                    "batch": batch,
                    "radius": radius,
                    "direction": direction,
                    "heads": [case.heads, case.kv_heads],
                    "dtype": dtype,
                    "way": way,
                    "seconds": seconds,
                    "spread": [min(taken), max(taken)],
                    "seconds_per_visual_token": seconds / len(case.query),
                    "useful_flops_per_second": 4 * pairs * case.heads * case.head_dim / seconds,
                    "speedup": speedup,
                    "share_of_ideal": None if speedup is None or way == "dense" else speedup / ideal,
                    "error": errors[turn],
                    **facts,
                }
            )
        if on_turn is not None:
            on_turn(done + 1, len(cases))
    return results


def _turn(way: str, radius: int) -> tuple[str, int | None]:
    return way, None if way == "dense" else radius
