"""The Triton kernels without a GPU: interpreted against the reference, and compiled ahead of time for real ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..marks import slow_but

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="the triton backend needs the triton package")

FAST = "1x1 or test_decode and none-1"  # again below
TESTS = (
    FAST,
    "test_visual",
    "test_text",
    "test_decode",
    "test_widths or test_half",
    "test_tile or test_mass or test_oper or test_exec",
)


@pytest.mark.parametrize("chosen", slow_but([FAST], TESTS))
def test_interpreted(chosen):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/interpreted.py",
        "-k",
        chosen,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def kernels():
    from vis_sparse.kernels.resources import TARGETS, shipped

    for target in TARGETS:
        for head_dim in (64, 128):
            marks = () if (target, head_dim) == ("sm_90", 128) else pytest.mark.slow
            for kernel in shipped(head_dim, target):
                yield pytest.param(kernel, target, id=f"{target}-{head_dim}-{kernel.name}", marks=marks)


@pytest.mark.parametrize("kernel, target", list(kernels()))
def test_compiled_ahead_of_time(kernel, target, record_property):
    """No spills on NVIDIA, shared memory within what a block may use, and the target's own matrix instructions."""
    from vis_sparse.kernels.resources import SHARED_LIMITS, compile_kernel

    found = compile_kernel(kernel, target)
    record_property("resources", f"{found.registers} registers, {found.spills} spills, {found.shared} bytes shared")
    assert found.shared <= SHARED_LIMITS[target]
    if target.startswith("sm_"):
        assert found.spills == 0
    if not kernel.name.startswith(("near", "runs", "mass")):
        return  # no matrix product
    # a wgmma or tcgen05 has 64 rows: decode and the small tiles of a grid have 16
    if "decode" in kernel.name or "small" in kernel.name:
        instruction = {"gfx942": "v_mfma"}.get(target, "mma.sync")
    else:
        instruction = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[target]
    assert instruction in found.assembly
