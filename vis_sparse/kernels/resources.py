"""Registers, spills and shared memory of the shipped kernels, compiled ahead of time: no GPU is needed.

`python -m vis_sparse.kernels.resources` prints the table that docs/kernels.md keeps.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_mass, triton_near, triton_runs, tuning
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

_FLOAT32 = {"lse_ptr", "delta_ptr", "mass_ptr", "parts_ptr", "part_lse_ptr"}
_TABLES = {"tiles_ptr", "segments_ptr", "runs_ptr", "columns_ptr", "blocks_ptr", "offsets_ptr"}
_RULE = {"RADIUS": 7, "FRAMES": 0, "STRIDE": 1, "CAUSAL": False, "ALIGNED": False}


@dataclass(frozen=True)
class Kernel:
    """One shipped kernel at one head width: its function, its configuration and the constants it is compiled with."""

    name: str
    function: triton.JITFunction
    blocks: Blocks
    constants: dict


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. spills: bytes a thread (registers on AMD). assembly: PTX or AMD assembly."""

    registers: int
    spills: int
    shared: int
    assembly: str


def shipped(head_dim: int, target: str) -> Iterator[Kernel]:
    """Every kernel as it would run on `target` in 16-bit types."""
    arch = TARGETS[target].arch
    device = Device(arch if isinstance(arch, int) else 0, PROCESSORS[target])
    width = {"HEAD_DIM": head_dim, "BLOCK_D": tuning.width_block(head_dim)}
    prefill = tuning.run_blocks(head_dim, 2, device)
    of_query, of_key = (f(head_dim, 2, device) for f in (tuning.query_gradient_blocks, tuning.key_gradient_blocks))
    tiles = {
        "large": (tuning.near_blocks(head_dim, 2, 1, 10**6, device), 1),
        "small": (tuning.near_blocks(head_dim, 2, 1, 1, device), 1),
        "GQA 7": (tuning.near_blocks(head_dim, 2, 7, 1, device), 7),
    }
    for name, (blocks, group) in tiles.items():
        tile_x = 1 << (blocks.queries.bit_length() // 2)
        tile = {"TILE_Y": blocks.queries // tile_x, "TILE_X": tile_x, "BLOCK_N": blocks.keys}
        constants = width | _RULE | tile | {"GROUP": group, "GROUP_BLOCK": triton.next_power_of_2(group)}
        yield Kernel(f"near forward, {name}", triton_near.near_forward, blocks, constants)
        if name != "small":
            yield Kernel(f"near dQ, {name}", triton_near.near_query_gradient, blocks, constants)
    tile_x = 1 << (of_key.keys.bit_length() // 2)
    tile = {"TILE_Y": of_key.keys // tile_x, "TILE_X": tile_x, "BLOCK_Q": of_key.queries, "GROUP": 1}
    rule = {name: value for name, value in _RULE.items() if name != "ALIGNED"}
    yield Kernel("near dK dV", triton_near.near_key_gradient, of_key, width | rule | tile)
    one = _sizes(prefill) | {"GROUP": 1, "HAS_BLIND": False}
    packed = {"HEADS": 1, "GROUP_BLOCK": 1}
    yield Kernel("runs forward", triton_runs.runs_forward, prefill, width | one | packed)
    decode = tuning.decode_blocks(head_dim, 2, 7, device)
    packed = {"HEADS": 7, "GROUP_BLOCK": 8, "GROUP": 7}
    yield Kernel("runs decode", triton_runs.runs_forward, decode, width | one | packed | _sizes(decode))
    yield Kernel("runs dQ", triton_runs.runs_query_gradient, of_query, width | one | _sizes(of_query))
    yield Kernel("runs dK dV", triton_runs.runs_key_gradient, of_key, width | one | _sizes(of_key))
    yield Kernel("mass", triton_mass.mass_forward, prefill, width | one)
    combine = Blocks(1, 1, 4, 1)
    yield Kernel("combine", triton_runs.combine, combine, width | {"SPLITS": 16, "SPLITS_BLOCK": 16})


def _sizes(blocks: Blocks) -> dict:
    return {"BLOCK_Q": blocks.queries, "BLOCK_N": blocks.keys}


def compile_kernel(kernel: Kernel, target: str, dtype: str = "bf16") -> Resources:
    """Compile for `target`. Pointers and strides are multiples of 16, as those of real models are."""
    signature, attributes = {}, {}
    constants = dict(kernel.constants)
    for index, name in enumerate(kernel.function.arg_names):
        signature[name] = _type(name, dtype, constants)
        if name == "blind_ptr":
            constants[name] = None
        elif name not in constants and not name.startswith("scale"):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=kernel.blocks.options)
    if "amdgcn" in compiled.asm:
        return _of_amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _of_cubin(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _type(name: str, dtype: str, constants: dict) -> str:
    if name in constants or name == "blind_ptr":
        return "constexpr"
    if name in _TABLES:
        return "*i32"
    if name.endswith("_ptr"):
        return "*fp32" if name in _FLOAT32 else f"*{dtype}"
    return "fp32" if name.startswith("scale") else "i32"


def _of_cubin(cubin: bytes, ptx: str, shared: int) -> Resources:
    """Local memory of a cubin is what ptxas spilled: the kernels have no arrays of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], max(shared, usage["SHARED"]), ptx)


def _of_amd(assembly: str, shared: int) -> Resources:
    def read(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])

    return Resources(read("vgpr_count"), read("vgpr_spill_count"), shared, assembly)


def main() -> None:
    print("| kernel | head dim | target | queries x keys, warps, stages | registers | spills | shared KiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for head_dim in (64, 128):
        for target in TARGETS:
            for kernel in shipped(head_dim, target):
                found, b = compile_kernel(kernel, target), kernel.blocks
                size = f"{b.queries} x {b.keys}, {b.warps}, {b.stages}"
                shared = f"{found.shared / 1024:.1f}"
                cells = (kernel.name, head_dim, target, size, found.registers, found.spills, shared)
                print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    sys.exit(main())
