"""What a run consists of: parts with a time limit each, every one a command of its own that cannot stop the others."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

MINUTES = 9
_OWN = ("-m", "vis_sparse.eval.gpu")
_BENCH = ("-m", "vis_sparse", "bench")


@dataclass(frozen=True)
class Part:
    """about: what it answers. limit: seconds. arguments: of the Python that runs it; {json} is the file for results."""

    name: str
    about: str
    limit: int
    arguments: tuple[str, ...]

    def command(self, folder: Path) -> list[str]:
        return [sys.executable, *(a.replace("{json}", str(folder / f"{self.name}.json")) for a in self.arguments)]


def parts(dry: bool) -> list[Part]:
    """In the order of what is worth knowing if the time runs out: correctness, kernels, whole models.

    dry: on a CPU with tiny sizes, so that the run itself is tested without a GPU.
    """
    device = "cpu" if dry else "cuda"
    where = ("--device", device, "--dtype", "float32" if dry else "bfloat16", "--repeats", "1" if dry else "3")
    own = ("--device", device, *(("--dry",) if dry else ()), "--json", "{json}")
    kernels = ("24x24", "2") if dry else ("24x24,48x48,64x64,128x128,8x32x32,16 of 16x16", "2,7")
    few = ("--most-heads", "1", "--ways", "dense,torch") if dry else ("--ways", "dense,flex,triton")
    layers, tests = ("4", ("-k", "test_mass")) if dry else ("32", ("-n", "8"))
    model = ("--model", "qwen2-vl-2b" if dry else "llava-1.5-7b", *where)
    plans = "yopo-12" if dry else "dense,auto,yopo-12"
    image = ("--image-size", "56x56") if dry else ()
    json, graphs = ("--json", "{json}"), () if dry else ("--graphs",)
    narrow = ("--repeats", "1", "--layers", "4") if dry else ("--repeats", "5")
    return [
        Part("ceilings", "what the device reaches at best", 40, (*_OWN, "ceilings", *own)),
        Part("tests", "whether the kernels are right", 120,
             ("-m", "pytest", "-m", "gpu", "tests/kernels/test_gpu.py", "-q", "-p", "no:cacheprovider", *tests)),
        Part("kernels", "visual attention in every backend", 90,
             (*_BENCH, "kernels", "--settings", kernels[0], "--radius", kernels[1], *where, *few, *json)),
        Part("pieces", "text attention, gradients, and what is fused around the products", 45, (*_OWN, "pieces", *own)),
        Part("model", "LLaVA-1.5-7B, batch 1", 50,
             (*_BENCH, *model, *image, "--layers", layers, "--plan", plans, "--decode", *json)),
        Part("graphs", "the same, prompts and decode steps as graphs", 55,
             (*_BENCH, *model, *image, "--layers", "2" if dry else "32", "--plan", "dense" if dry else "auto,yopo-12",
              "--decode", "--graphs", *json)),
        Part("compiled", "the unpatched model compiled, and a plan beside it", 65,
             (*_BENCH, *model, *image, "--layers", "4" if dry else "8", "--plan", "yopo-12", "--compile", *json)),
        Part("host", "the host's time and launches of a call", 35,
             (*_BENCH, "--host", "--model", model[1], "--plan", plans, *narrow, *json)),
        Part("batch", "LLaVA-1.5-7B, batch 8, as graphs", 40,
             (*_BENCH, *model, *image, "--layers", layers, "--batch", "2" if dry else "8", "--plan", plans, "--decode",
              *graphs, *json)),
    ]  # fmt: skip
