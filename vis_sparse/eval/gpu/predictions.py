"""What the kernels should take on an H100, from their tables and their compiled code: written before any was timed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...cost.pairs import lane_pairs, near_pairs
from ...cost.roofline import DEVICES
from ...kernels import tuning
from ...kernels.tilings import Tiling, best_tiling
from ...layout.layout import VisualLayout
from ...plans.layer_plan import Neighborhood
from ..bench_kernels import SETTINGS, TEXT_BEFORE, Setting

_H100 = DEVICES["h100"]
_DEVICE = tuning.Device(90, 132)
_CLOCK = 1.755e9
_L2 = 5.5e12  # bytes/s
_SHARE = 0.6  # of the peak of the tensor cores that a plain kernel reaches
_ISSUED = 0.8  # of the slots in which a scheduler can issue an instruction
_LAUNCH = 5e-6
TEXT, TEXT_BEHIND = 64, 29
# Instructions of a warp for a step of the compiled forward on sm_90 at width 128, by rows of the tile: masked in a box,
# and at the end of the text before it (`python -m vis_sparse.kernels.resources --loops`).
STEPS = {64: (662, 582), 16: (258, 218)}


@dataclass(frozen=True)
class Prediction:
    """Of one setting and radius at batch 1. ideal: pairs of a head that are read. parts: seconds of what may bind.
    dense: seconds of attention over all tokens."""

    flops: int
    bytes: int
    tiling: Tiling
    ideal: int
    parts: dict[str, float]
    dense: float

    @property
    def floors(self) -> tuple[float, float]:
        return self.flops / _H100.peak, self.bytes / _H100.bandwidth

    @property
    def seconds(self) -> float:
        return max(self.parts.values()) + _LAUNCH


def predict(name: str, radius: int) -> Prediction:
    """A setting of `bench kernels` under a neighbourhood in both directions, 16-bit types."""
    setting = SETTINGS[name]
    near, layout, length = Neighborhood(radius, "both", frames=1), _layout(setting), _length(setting)
    group = setting.heads // setting.kv_heads
    visual = length - TEXT_BEFORE
    blocks = tuning.near_blocks(setting.head_dim, 2, group, -(-visual // 64) * setting.kv_heads, _DEVICE)
    grids = np.array([[0, 0, 0, *grid, 0, 1] for grid in setting.grids])
    tiling = best_tiling(near, grids, np.array([[0, TEXT_BEFORE, 0, 0]]), blocks.queries, blocks.keys)
    ideal = near_pairs(near, layout) + lane_pairs(layout, TEXT_BEFORE).visual_text
    row = 2 * setting.head_dim
    moved = visual * 2 * setting.heads * row + length * 2 * setting.kv_heads * row
    rows = blocks.queries * (1 if group == 1 else 1 << (group - 1).bit_length())
    walked = tiling.walked // blocks.queries  # keys of all tiles of a KV head, steps counted whole
    text = len(tiling.entries) * TEXT_BEFORE
    masked, before = STEPS[rows]
    instructions = (walked - text) / blocks.keys * masked + len(tiling.entries) * -(
        -TEXT_BEFORE // blocks.keys
    ) * before
    slots = 4 * _DEVICE.processors * _CLOCK * _ISSUED
    pair = 4 * setting.head_dim
    parts = {
        "tensor cores": rows * walked * setting.kv_heads * pair / (_SHARE * _H100.peak),
        "instructions": instructions * blocks.warps * setting.kv_heads / slots,
        "L2": walked * setting.kv_heads * 2 * row / _L2,
        "memory": moved / _H100.bandwidth,
    }
    all_pairs = length * (length + 1) // 2
    all_bytes = length * 2 * (setting.heads + setting.kv_heads) * row
    dense = max(all_pairs * setting.heads * pair / (_SHARE * _H100.peak), all_bytes / _H100.bandwidth) + _LAUNCH
    return Prediction(ideal * setting.heads * pair, moved, tiling, ideal, parts, dense)


def text_floors(name: str) -> dict[str, tuple[int, float]]:
    """For "prefill" FLOPs, for "decode" and "mass" of one row bytes, and seconds that none of them can beat."""
    setting, length = SETTINGS[name], _length(SETTINGS[name]) + TEXT_BEHIND
    pair, row = 4 * setting.head_dim, 2 * setting.head_dim
    pairs = TEXT_BEFORE * (TEXT_BEFORE + 1) // 2 + sum(range(length - TEXT_BEHIND + 1, length + 1))
    flops, keys = pairs * setting.heads * pair, length * setting.kv_heads * row
    moved = 2 * keys + 2 * TEXT * setting.heads * row
    return {
        "prefill": (flops, max(flops / _H100.peak, moved / _H100.bandwidth)),
        "decode": (2 * keys, 2 * keys / _H100.bandwidth),
        "mass": (keys, keys / _H100.bandwidth),
    }


def _layout(setting: Setting) -> VisualLayout:
    starts, position = [], TEXT_BEFORE
    for grid in setting.grids:
        starts.append((position, grid))
        position += int(np.prod(grid))
    return VisualLayout.from_grids([starts])


def _length(setting: Setting) -> int:
    return TEXT_BEFORE + sum(int(np.prod(grid)) for grid in setting.grids)
