"""Trains the deep model from nothing but SmolLM2: `python -m vis_sparse.eval.deep --out FOLDER`. Stopped and started
again, it goes on. FOLDER gets the logs, the states of all stages and, at the end, what is shipped.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from vis_sparse.eval.deep.export import export
from vis_sparse.eval.tiny.smol_files import DIFFERENCE

STAGES = {"vision": 15.0, "whole": 65.0, "eyes": 20.0, "again": 25.0}  # minutes

# One thread each: two would wait for each other at full load when other work runs beside them. And the C library keeps
# what is freed: it gave large tensors back to the system, and half of the time went into getting them again.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}  # fmt: skip


def main(folder: Path, processes: int, minutes: tuple[float, ...]) -> None:
    environment = os.environ | ENVIRONMENT
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    for stage, budget in zip(STAGES, minutes, strict=True):
        module = ["train_vision", "--out", str(folder / stage)]
        if stage != "vision":
            module = ["train", "--stage", stage, "--out", str(folder)]
        command = [*launcher, f"vis_sparse.eval.deep.{module[0]}", *module[1:], "--minutes", str(budget)]
        subprocess.run(command, env=environment, check=True)
    export(folder, stage, folder / DIFFERENCE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/tiny/smol"), metavar="FOLDER")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--minutes", type=float, nargs=len(STAGES), default=list(STAGES.values()), metavar=tuple(STAGES)
    )
    given = parser.parse_args()
    main(given.out, given.processes, tuple(given.minutes))
