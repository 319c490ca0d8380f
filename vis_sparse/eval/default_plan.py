"""What the default plan promises, measured: `python -m vis_sparse.eval.default_plan` asks the shipped models of 8
layers held-out questions, dense and under `auto`, and prints a table. For the deep model: `vis_sparse.eval.deep.front`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..calibration.profiles import Target
from ..cost.shape_lookup import shape_of
from ..plans.files import as_plan
from ..plans.plan import VisualPlan
from .comparison.answers import answers, computed
from .comparison.paired import only_one_right
from .progress import progress
from .tiny import NAMES, checkpoint
from .tiny.data import KINDS

PLAN = "auto"


def row(name: str, asked: int, on_step: Callable[[int, int], None]) -> str:
    """A line of Markdown: dense and plan in percent by kind, and the questions that only one of them answers right."""
    folder = checkpoint(name)
    target = Target.of(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval())
    layers = shape_of(target.model).layers
    plans = [VisualPlan.dense(layers), as_plan(PLAN, layers)]
    given = answers(target, AutoProcessor.from_pretrained(folder), plans, asked, on_step)
    dense, own = (given[computed(plan)] for plan in plans)
    cells = []
    for kind in KINDS:
        won, lost = only_one_right(own.right[kind], dense.right[kind])
        cells.append(f"{dense.right[kind].mean():.1%} / {own.right[kind].mean():.1%} (+{won} -{lost})")
    return f"| {name} | {' | '.join(cells)} | {own.kl:.1e} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000, help="of each kind")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    given = parser.parse_args()
    print(f"| model | {' | '.join(KINDS)} | KL |\n{'| --- ' * (len(KINDS) + 2)}|", flush=True)
    for name in given.models:
        with progress(name) as step:
            line = row(name, given.questions, step)
        print(line, flush=True)
