"""Block sizes of the Triton kernels, by head width, element size and target. A table with reasons, not a search.

The reasons are in docs/kernels.md. What decides: accumulators and one block of scores must fit the registers (no
spills), the blocks of K and V in flight must fit the shared memory, at least 64 rows make a wgmma on sm_90, and there
should be a program for every multiprocessor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

# Programs a multiprocessor should get before larger tiles are worth their halo.
_WAVES = 2
DECODE_ROWS = 16  # the smallest M of a tensor core product
_MOST_PARTS = 64  # of a gradient: what is written and added again stays small
_SLOTS_A_SPLIT = 256  # fewer keys than this are not worth a program of their own


class Blocks(NamedTuple):
    """queries: positions of a program, in one head or in all heads of a KV group. keys: of a step.

    registers: bound of a thread on NVIDIA, 0 for none. Without one ptxas spills a few bytes in some kernels to fit one
    more block a multiprocessor; in which ones depends on its version.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Options of a launch."""
        bound = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | bound


class Device(NamedTuple):
    """What the choice depends on: compute capability (90 = sm_90; 0 on AMD and in the interpreter), processors."""

    capability: int
    processors: int


def device_of(tensor: torch.Tensor) -> Device:
    if tensor.device.type != "cuda":
        return Device(0, 1)
    properties = torch.cuda.get_device_properties(tensor.device)
    capability = 0 if torch.version.hip else 10 * properties.major + properties.minor
    return Device(capability, properties.multi_processor_count)


def width_block(head_dim: int) -> int:
    """Width of a block of rows: the power of two at or above head_dim."""
    return max(triton.next_power_of_2(head_dim), 16)


def _bound(registers: int, head_dim: int, device: Device) -> int:
    """Measured up to a width of 128; wider kernels may need more."""
    return registers if device.capability and width_block(head_dim) <= 128 else 0


def near_blocks(head_dim: int, item_size: int, group: int, programs: int, device: Device) -> Blocks:
    """Forward and query gradient of a neighbourhood. group: heads of a KV head. programs: 64-query tiles x KV heads."""
    width, members = width_block(head_dim), triton.next_power_of_2(group)
    if item_size == 4:
        return Blocks(max(16 // members, 1), 32 if width <= 128 else 16, 4, 1)
    if members == 1 and programs < _WAVES * device.processors:
        return Blocks(16, 32, 4, 2, _bound(128, head_dim, device))
    bound = 128 if width <= 64 and device.capability >= 100 else 0
    return Blocks(max(64 // members, 1), 64 if width <= 128 else 32, *_near_warps(width, device), bound)


def _near_warps(width: int, device: Device) -> tuple[int, int]:
    """Warps and stages for 64 rows. A wgmma of 64 rows is one group of four warps: a second group would do its softmax
    and masks once more. Two such programs with three stages fit a multiprocessor; with two stages triton 3.6 spills.
    Four warps of sm_80 and sm_100 spill at width 128, eight of an AMD GPU do."""
    if 90 <= device.capability < 100 and width <= 128:
        return 4, 3
    return (8 if device.capability else 4), 2


def near_gradient_blocks(forward: Blocks, head_dim: int, device: Device) -> Blocks:
    """Gradient of queries in the tiles of the forward: a third product, for which four warps of sm_90 lack registers.
    On sm_80 two stages spill at width 64, three do not."""
    if forward.keys < 64 or not 0 < device.capability < 100:
        return forward
    return forward._replace(warps=8, stages=3 if device.capability < 90 and width_block(head_dim) <= 64 else 2)


def run_blocks(head_dim: int, item_size: int, device: Device) -> Blocks:
    """Prefill of text, and "full" visual attention: one head a program."""
    width = width_block(head_dim)
    if item_size == 4:
        return Blocks(16, 32 if width <= 128 else 16, 4, 1)
    if width > 128:
        return Blocks(64, 32, 8, 2)
    narrow = width == 128 and (device.capability == 0 or device.capability >= 100)
    return Blocks(128, 32 if narrow else 64, 8, 3 if device.capability else 2)


def decode_blocks(head_dim: int, item_size: int, group: int, device: Device) -> Blocks:
    """Few queries: all heads of a KV group a program, so that each key is read once."""
    members = triton.next_power_of_2(group)
    wide = width_block(head_dim) * item_size > 256
    stages, bound = (1, 0) if item_size == 4 else (2, _bound(168, head_dim, device))
    return Blocks(max(DECODE_ROWS // members, 1), 32 if wide else 64, 4, stages, bound)


def is_decode(queries: int, group: int) -> bool:
    return queries * triton.next_power_of_2(group) <= DECODE_ROWS


def decode_splits(programs: int, slots: int, device: Device) -> int:
    """Parts that the keys are split into, so that every multiprocessor has work (flash-decoding)."""
    wanted = triton.cdiv(2 * device.processors, programs)
    return max(1, min(wanted, slots // _SLOTS_A_SPLIT))


def key_gradient_splits(programs: int, rows: int, queries: int, device: Device) -> int:
    """Parts that the queries behind a block of keys are split into. programs: blocks x KV heads, of few text keys a
    handful. A part takes `queries` rows a step, and at least two steps."""
    wanted = triton.cdiv(_WAVES * device.processors, programs)
    return max(1, min(wanted, rows // (2 * queries), _MOST_PARTS))


def precision(item_size: int, device: Device) -> str:
    """How products of float32 are done: as three of TF32 on tensor cores, which keeps 22 bits (one keeps 11, and the
    tolerance is 1e-5), or, where there are none that do, in float32."""
    return "tf32x3" if item_size == 4 and device.capability >= 80 else "ieee"


def query_gradient_blocks(head_dim: int, item_size: int, device: Device) -> Blocks:
    """Gradient of queries over runs."""
    width = width_block(head_dim)
    if item_size == 4 or width > 128:
        return Blocks(16 if item_size == 4 else 32, 16 if width > 128 else 32, 4, 1)
    if width == 128:
        return Blocks(64, 64, 8, 1) if device.capability else Blocks(32, 64, 4, 1)
    return Blocks(64, 64, 4, 1, 128 if device.capability >= 100 else 0)


def key_gradient_blocks(head_dim: int, item_size: int, device: Device) -> Blocks:
    """Gradients of keys and values, over runs and in a neighbourhood: two accumulators, so fewer queries at a time."""
    width = width_block(head_dim)
    if item_size == 4 or width > 128:
        return Blocks(16, 16 if width > 128 else 32, 4, 1)
    if width == 128:
        return Blocks(32, 64, 8, 1) if device.capability else Blocks(32, 32, 4, 1)
    return Blocks(32, 64, 4, 1)
