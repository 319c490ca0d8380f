"""`python -m vis_sparse.eval.before`: what the shipped models answer when visual tokens leave before the decoder.

Held-out questions of each kind, on the dense decoder. An answer is right if all its tokens are the likeliest ones,
which is what greedy `generate` gives.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..calibration.records import Record
from ..calibration.samples import answer_rows, encode
from ..cost.flops import flops
from ..cost.shape_lookup import shape_of
from ..patches import inspect, patched
from ..plans.before import TokensBefore
from ..plans.plan import VisualPlan
from .progress import progress
from .tiny import checkpoint
from .tiny.dialogs import questions
from .tiny.families import family_of, kinds_of

SHARES = (0.5, 0.25)
ORDERS = ("received", "relevance", "stride")  # the shipped models see no videos


@dataclass(frozen=True)
class Asked:
    """right: by kind, the share of right answers. entered: the share of visual tokens that came into the decoder.
    work: FLOPs of the decoder as a share of the dense one's, mean over the questions."""

    right: dict[str, float]
    entered: float
    work: float


def plans(layers: int) -> dict[str, VisualPlan]:
    dense = VisualPlan.dense(layers)
    named = {"dense": dense, "duplicate": dense.replace(before=TokensBefore("duplicate"))}
    return named | {
        f"{by} {share:.0%}": dense.replace(before=TokensBefore(by, share)) for share in SHARES for by in ORDERS
    }


@torch.no_grad()
def ask(model: nn.Module, plan: VisualPlan, samples: dict[str, list[dict]]) -> Asked:
    """samples: by kind, as `encode` makes them."""
    right, entered, work = {}, [], []
    shape, dense = shape_of(model), VisualPlan.dense(plan.num_layers)
    with patched(model, plan):
        for kind, asked in samples.items():
            found = []
            for sample in asked:
                rows = answer_rows(sample)
                answer = model(**sample).logits[0, rows].argmax(-1)
                found.append(torch.equal(answer, sample["labels"][0, rows + 1]))
                call = inspect(model)["last_call"]
                entered.append(call.entered / call.layout.num_visual)
                settings = {"layout": call.layout, "text_tokens": call.text_length, "duplicates": 1 - entered[-1]}
                work.append(flops(shape, plan, **settings).total / flops(shape, dense, **settings).total)
            right[kind] = sum(found) / len(found)
    return Asked(right, sum(entered) / len(entered), sum(work) / len(work))


def table(answered: dict[str, Asked]) -> str:
    """Markdown."""
    kinds = list(next(iter(answered.values())).right)
    lines = [f"| before | tokens | FLOPs | {' | '.join(kinds)} |", f"| {' | '.join(['---'] * (3 + len(kinds)))} |"]
    for name, asked in answered.items():
        shares = " | ".join(f"{100 * asked.right[kind]:.1f}" for kind in kinds)
        lines.append(f"| {name} | {asked.entered:.0%} | {asked.work:.0%} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llava,qwen2_vl,internvl")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions of each kind")
    given = parser.parse_args()
    for name in given.models.split(","):
        model = AutoModelForImageTextToText.from_pretrained(checkpoint(name), dtype=torch.float32).eval()
        processor, family = AutoProcessor.from_pretrained(checkpoint(name)), family_of(model)
        samples = {
            kind: [
                encode(processor, Record(q.image, q.text, q.answer))
                for q in questions(kind, given.questions, sizes=family.SIZES)
            ]
            for kind in kinds_of(family)
        }
        named, answered = plans(model.config.text_config.num_hidden_layers), {}
        with progress(name) as step:
            for plan in named:
                answered[plan] = ask(model, named[plan], samples)
                step(len(answered), len(named))
        print(f"{name}\n\n{table(answered)}\n", flush=True)


if __name__ == "__main__":
    main()
