"""pytest on a copy of the package, in processes forked from one that has imported what no mutant changes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .mutant import ROOT

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([
    "pytest", "hypothesis", "torch._dynamo", "torch.utils.flop_counter", "transformers.generation.utils",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("clip", "llama", "llava", "mistral", "qwen2")),
])  # fmt: skip


def copy_to(folder: Path) -> Path:
    for part in ("vis_sparse", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_tests(folder: Path, tests: Sequence[str], timeout: float | None = None) -> tuple[int | None, str]:
    """(exit status, output) of pytest in a copy, up to the first failure; None: no answer in `timeout` seconds."""
    process = _SERVER.Process(target=_pytest, args=(folder, tests))
    process.start()
    process.join(timeout)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    return status, (folder / "output").read_text()


def _pytest(folder: Path, tests: Sequence[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "vis_sparse")]:
        del sys.modules[name]  # those of the checkout
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # that of a mutant must not outlive it
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import pytest

    options = ("-x", "-q", "-p", "no:cacheprovider", "--tb=line")
    sys.exit(pytest.main([*options, *(f"tests/{each}" for each in tests)]))
