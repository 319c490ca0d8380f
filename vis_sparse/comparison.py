"""Searched plans and calibrated masks against their alternatives, on held-out questions of a shipped tiny model.

`python -m vis_sparse.comparison --model llava` calibrates and searches on training images, and writes a JSON file and a
Markdown table. An answer counts if all its tokens are the likeliest ones, which is what greedy `generate` gives.
Stopped and started again, the search goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from operator import truediv
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from .calibration import Calibration, calibrate
from .calibration.chains import chains
from .calibration.probe import Probe
from .calibration.profiles import Target
from .calibration.records import Record
from .calibration.samples import encode
from .calibration.search import COUNTED, best_within, search_front
from .cli.data import TINY, records
from .cost import flops
from .eval.progress import progress
from .eval.timing import machine_facts
from .eval.tiny import checkpoint
from .eval.tiny.data import KINDS, questions
from .eval.tiny.families import family_of
from .heads import keep_heads
from .plan import HeadBudget, VisualPlan, mask_plan
from .shapes import shape_of

BUDGETS = (0.5, 0.25, 0.12)
SEEDS = 5
KEPT = 0.25  # of heads
_CHUNK = 125


def head_plans(calibration: Calibration) -> dict[str, VisualPlan]:
    """Masks that keep a quarter of all heads, in each layer as many as the calibrated mask keeps there."""
    dense, scores = VisualPlan.dense(len(calibration.heads)), calibration.heads
    best = keep_heads(scores, HeadBudget(KEPT, over="model"), scores.shape[1])

    def like(other: np.ndarray) -> VisualPlan:
        rows = (keep_heads(row[None], HeadBudget(int(n)), len(row))[0] for row, n in zip(other, best.sum(1)))
        return mask_plan(dense, [row.tolist() for row in rows])

    worst = keep_heads(-scores, HeadBudget(KEPT, over="model"), scores.shape[1])
    plans = {
        "heads: calibrated": mask_plan(dense, best.tolist()),
        "heads: attention mass": like(calibration.mass),
        "heads: inverted counts": like(-scores),
        "heads: inverted": mask_plan(dense, worst.tolist()),
    }
    rng = np.random.default_rng(0)
    return plans | {f"heads: random {seed}": like(rng.random(scores.shape)) for seed in range(SEEDS)}


def measured(target: Target, processor, plans: dict[str, VisualPlan], asked: int, on_step) -> dict[str, dict]:
    """Each plan on held-out questions: share of right answers by kind, and the mean KL to dense (nats)."""
    results = {name: dict.fromkeys((*KINDS, "kl"), 0.0) for name in plans}
    done, total = 0, len(KINDS) * -(-asked // _CHUNK) * len(plans)
    for kind in KINDS:
        held_out = questions(kind, asked, sizes=family_of(target.model).SIZES)
        for start in range(0, asked, _CHUNK):
            chunk = held_out[start : start + _CHUNK]
            probe = Probe(target, [encode(processor, Record(q.image, q.text, q.answer)) for q in chunk], 25)
            for name, plan in plans.items():
                kl, accuracy = probe.measure(plan)
                results[name][kind] += accuracy * len(chunk) / asked
                results[name]["kl"] += kl * len(chunk) / asked / len(KINDS)
                done += 1
                on_step(done, total)
    return results


def compare(family: str, num_samples: int, asked: int, log: Path, on_step) -> dict:
    """All plans for a shipped model, their cost as a share of dense visual FLOPs, and how they do."""
    folder, data = checkpoint(family), next(name for name, of in TINY.items() if of == family)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    samples = [encode(processor, record) for record in records(data, num_samples, None)]
    calibration, target, shape = calibrate(model, samples, data=data), Target.of(model), shape_of(model)
    probe = Probe(target, samples)
    dense = probe.plan
    middle = int(np.argsort(probe.lengths, kind="stable")[len(samples) // 2])
    layout, text = probe.layouts[middle], probe.lengths[middle] - probe.layouts[middle].num_visual

    def cost(plan: VisualPlan) -> float:
        counted = (flops(shape, each, layout=layout, text_tokens=text) for each in (plan, dense))
        return truediv(*map(COUNTED["visual"], counted))

    plans = {"dense": dense} | head_plans(calibration)
    peers = chains(calibration.heads, shape.kv_heads, probe.divergence)
    for budget in BUDGETS:
        points = list(search_front(model, samples, budget=budget, calibration=calibration, log=log))
        found = plans[f"{budget:.0%}: searched"] = best_within(points, budget).plan
        for name, chain in peers.items():
            plans[f"{budget:.0%}: {name}"] = _spending(chain, cost(found), cost)
    results = measured(target, processor, plans, asked, on_step)
    return {
        "model": family,
        "samples": num_samples,
        "questions": asked,
        **machine_facts(model.device),
        "plans": [
            {"plan": name, "cost": cost(plan), **results[name], "layers": [str(layer) for layer in plan.layers]}
            for name, plan in plans.items()
        ],
    }


def _spending(chain: Iterable[VisualPlan], budget: float, cost) -> VisualPlan:
    """The cheapest plan of a chain that costs at least `budget`; the dearest one if none does."""
    dear = sorted(chain, key=cost)
    return next((plan for plan in dear if cost(plan) >= budget), dear[-1])


def table(rows: list[dict]) -> str:
    """A Markdown table of `compare`'s plans."""
    lines = ["| plan | visual FLOPs | " + " | ".join(KINDS) + " | KL |", "| --- |" + " --- |" * (2 + len(KINDS))]
    for row in rows:
        cells = [row["plan"], f"{row['cost']:.1%}", *(f"{100 * row[kind]:.1f}" for kind in KINDS), f"{row['kl']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/comparison"), metavar="FOLDER")
    parser.add_argument("--model", choices=list(TINY.values()), default="llava")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--questions", type=int, default=1000, help="held-out questions of each kind")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with progress("comparing") as step:
        result = compare(given.model, given.samples, given.questions, given.out / f"{given.model}.log", step)
    (given.out / f"{given.model}.json").write_text(json.dumps(result, indent=2) + "\n")
    (given.out / f"{given.model}.md").write_text(table(result["plans"]))
    print(table(result["plans"]), end="")


if __name__ == "__main__":
    main()
