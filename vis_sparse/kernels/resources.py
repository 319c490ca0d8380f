"""Registers, spills and shared memory of the shipped kernels, compiled ahead of time: no GPU is needed.

`python -m vis_sparse.kernels.resources` prints the table that docs/kernels.md keeps; with `--loops`, also how many
instructions of NVIDIA's machine code a warp runs for each step of a kernel's loops.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..plans.layer_plan import Neighborhood
from . import fused_launches, triton_fused, triton_mass, triton_near, triton_ops, triton_runs, triton_steps, tuning
from .tilings import best_tiling
from .tuning import Blocks, Device

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a block may use, in bytes.
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}

_FLOAT32 = {
    "lse_ptr",
    "delta_ptr",
    "mass_ptr",
    "parts_ptr",
    "part_lse_ptr",
    "part_k_ptr",
    "part_v_ptr",
    "inverse_ptr",
    "part_ptr",
}
_TABLES = {
    "tiles_ptr",
    "segments_ptr",
    "runs_ptr",
    "columns_ptr",
    "blocks_ptr",
    "offsets_ptr",
    "places_ptr",
    "units_ptr",
}
_BYTES = {"read_ptr", "visual_ptr", "blind_ptr"}
_ABSENT = {"blind_ptr": "HAS_BLIND", "index_ptr": "HAS_INDEX"}  # None in what is compiled without
_RADIUS = 7


@dataclass(frozen=True)
class Kernel:
    """One shipped kernel at one head width: its function, its configuration and the constants it is compiled with."""

    name: str
    function: triton.JITFunction
    blocks: Blocks
    constants: dict


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. spills: bytes a thread (registers on AMD). assembly: PTX or AMD assembly. cubin: of
    NVIDIA."""

    registers: int
    spills: int
    shared: int
    assembly: str
    cubin: bytes | None = None


def shipped(head_dim: int, target: str) -> Iterator[Kernel]:
    """Every kernel as it would run on `target` in 16-bit types."""
    arch = TARGETS[target].arch
    device = Device(arch if isinstance(arch, int) else 0, PROCESSORS[target])
    width = {"HEAD_DIM": head_dim, "BLOCK_D": tuning.width_block(head_dim), "PRECISION": "ieee"}
    prefill = tuning.run_blocks(head_dim, 2, device)
    of_query, of_key = (f(head_dim, 2, device) for f in (tuning.query_gradient_blocks, tuning.key_gradient_blocks))
    tiles = {
        "large": (tuning.near_blocks(head_dim, 2, 1, 10**6, device), 1),
        "small": (tuning.near_blocks(head_dim, 2, 1, 1, device), 1),
        "GQA 7": (tuning.near_blocks(head_dim, 2, 7, 1, device), 7),
    }
    for name, (blocks, group) in tiles.items():
        constants = width | _box(blocks.queries, blocks.keys) | {"GROUP": group}
        constants["GROUP_BLOCK"] = triton.next_power_of_2(group)
        yield Kernel(f"near forward, {name}", triton_near.near_forward, blocks, constants)
        if name != "small":
            yield Kernel(
                f"near dQ, {name}",
                triton_near.near_query_gradient,
                tuning.near_gradient_blocks(blocks, head_dim, device),
                constants,
            )
    constants = width | _box(of_key.keys, of_key.queries, of_keys=True) | {"GROUP": 1}
    yield Kernel("near dK dV", triton_near.near_key_gradient, of_key, constants)
    one = _sizes(prefill) | {"GROUP": 1, "HAS_BLIND": False}
    packed = {"HEADS": 1, "GROUP_BLOCK": 1}
    yield Kernel("runs forward", triton_runs.runs_forward, prefill, width | one | packed)
    decode = tuning.decode_blocks(head_dim, 2, 7, device)
    packed = {"HEADS": 7, "GROUP_BLOCK": 8, "GROUP": 7}
    yield Kernel("runs decode", triton_runs.runs_forward, decode, width | one | packed | _sizes(decode))
    step = {"GROUP": 7, "GROUP_BLOCK": 16, "BLOCK_N": decode.keys}
    step |= dict.fromkeys(("HAS_READ", "HAS_LAST", "HAS_BLIND"), True)
    yield Kernel("decode step", triton_steps.steps_forward, decode, width | step)
    yield Kernel("runs dQ", triton_runs.runs_query_gradient, of_query, width | one | _sizes(of_query))
    for name, split in (("runs dK dV", False), ("runs dK dV, in parts", True)):
        yield Kernel(name, triton_runs.runs_key_gradient, of_key, width | one | _sizes(of_key) | {"SPLIT": split})
    joined = {"BLOCK_N": of_key.keys, "ROWS": 4}
    yield Kernel("join dK dV", triton_runs.join_key_gradients, Blocks(1, 4, 4, 3), width | joined)
    yield Kernel("mass", triton_mass.mass_forward, prefill, width | one)
    yield from _fused(head_dim, width)
    combine = Blocks(1, 1, 4, 1)
    yield Kernel("combine", triton_runs.combine, combine, width | {"SPLITS": 16, "SPLITS_BLOCK": 16})


def _fused(head_dim: int, width: dict) -> Iterator[Kernel]:
    """As for a hidden size of 4096, heads of queries and keys normed, and all of a residual."""
    row = fused_launches.row_sizes(4096)
    warps = row.pop("num_warps")
    flags = {"HAS_FIRST": True, "HAS_SECOND": True, "HAS_INDEX": False, "SAVE": False}
    heads = width | {"WIDTH": head_dim, "BLOCK_H": fused_launches.HEADS_A_PROGRAM, "HAS_NORM": True, "BACK": False}
    heads |= {"HAS_PLACES": True, "HAS_UNITS": True}
    gate = {"BLOCK": fused_launches.GATED_A_PROGRAM}
    yield Kernel("sum and norm", triton_fused.norm_forward, Blocks(1, 1, warps, 3), row | flags)
    yield Kernel("norm gradient", triton_fused.norm_gradient, Blocks(1, 1, warps, 3), row)
    yield Kernel("rotation", triton_fused.rotate_heads, Blocks(1, 1, 4, 3), heads)
    yield Kernel("rotation into a store", triton_fused.rotate_into, Blocks(1, 1, 4, 3), heads)
    yield Kernel("gate", triton_fused.gate_forward, Blocks(1, 1, 4, 3), gate)
    yield Kernel("gate gradient", triton_fused.gate_gradient, Blocks(1, 1, 4, 3), gate)


def _box(positions: int, entries: int, of_keys: bool = False) -> dict:
    """The rule and the sides that it gets on a large grid."""
    near, grid = Neighborhood(_RADIUS, "both"), np.array([[0, 0, 0, 1, 48, 48, 0, 0]])
    tiling = best_tiling(near, grid, np.zeros((0, 4), dtype=int), positions, entries, of_keys)
    return triton_ops.box_constants((_RADIUS, 0, 1, 0), tiling.sides)


def _sizes(blocks: Blocks) -> dict:
    return {"BLOCK_Q": blocks.queries, "BLOCK_N": blocks.keys}


def compile_kernel(kernel: Kernel, target: str, dtype: str = "bf16") -> Resources:
    """Compile for `target`. Pointers and strides are multiples of 16, as those of real models are."""
    signature, attributes = {}, {}
    names = kernel.function.arg_names
    constants = {name: value for name, value in kernel.constants.items() if name in names}
    for index, name in enumerate(names):
        signature[name] = _type(name, dtype, constants)
        if signature[name] == "constexpr" and name not in constants:
            constants[name] = None
        elif name not in constants and _type(name, dtype, constants) != "fp32":
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=kernel.blocks.options)
    if "amdgcn" in compiled.asm:
        return _of_amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _of_cubin(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _type(name: str, dtype: str, constants: dict) -> str:
    if name in constants or name in _ABSENT and not constants.get(_ABSENT[name]):
        return "constexpr"
    if name in _BYTES:
        return "*u8"
    if name == "last_ptr":
        return "*i64"
    if name in _TABLES:
        return "*i32"
    if name.endswith("_ptr"):
        return "*fp32" if name in _FLOAT32 else f"*{dtype}"
    return "fp32" if name.startswith("scale") or name == "eps" else "i32"


def _of_cubin(cubin: bytes, ptx: str, shared: int) -> Resources:
    """Local memory of a cubin is what ptxas spilled: the kernels have no arrays of their own."""
    text = _dump(cubin, "--dump-resource-usage")
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], max(shared, usage["SHARED"]), ptx, cubin)


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


def loop_lengths(cubin: bytes) -> list[int]:
    """Instructions of the innermost loops, in the order of the code; a branch backwards to itself is no loop."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);", _dump(cubin, "--dump-sass"))
    code = [(int(address, 16), name, operands) for address, name, operands in found]
    loops = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    lengths = [sum(low <= address <= high for address, _, _ in code) for low, high in inner]
    return [length for length in lengths if length > 8]  # shorter ones wait for a barrier


def _of_amd(assembly: str, shared: int) -> Resources:
    def read(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])

    return Resources(read("vgpr_count"), read("vgpr_spill_count"), shared, assembly)


def main() -> None:
    with_loops = "--loops" in sys.argv
    print("| kernel | head dim |", " | ".join(TARGETS), "|\n| --- | --- |", " | ".join("---" for _ in TARGETS), "|")
    for head_dim in (64, 128):
        for kernels in zip(*(shipped(head_dim, target) for target in TARGETS)):
            cells = [_cell(kernel, target, with_loops) for kernel, target in zip(kernels, TARGETS)]
            print(f"| {kernels[0].name} | {head_dim} |", " | ".join(cells), "|", flush=True)


def _cell(kernel: Kernel, target: str, with_loops: bool) -> str:
    found, b = compile_kernel(kernel, target), kernel.blocks
    cell = (
        f"{b.queries} x {b.keys}, {b.warps}, {b.stages}: {found.registers} / {found.spills} / {found.shared / 1024:.1f}"
    )
    return cell if not with_loops or found.cubin is None else f"{cell}; {loop_lengths(found.cubin)}"


if __name__ == "__main__":
    sys.exit(main())
