"""Searched plans and calibrated masks against their alternatives, on held-out questions of the shipped tiny LLaVA.

`python -m vis_sparse.comparison --out FOLDER` calibrates and searches on training images, and writes `comparison.json`
and Markdown tables. An answer counts if all its tokens are the likeliest ones, which is what greedy `generate` gives.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from .calibration import Calibration, calibrate
from .calibration.probe import Probe
from .calibration.profiles import Target
from .calibration.records import Record
from .calibration.samples import encode
from .calibration.search import COSTS, search_front
from .cli.data import TINY, records
from .cost import flops
from .eval.progress import progress
from .eval.tiny import checkpoint
from .eval.tiny.data import KINDS, questions
from .heads import keep_heads
from .plan import HeadBudget, LayerPlan, Neighborhood, VisualPlan, mask_plan, with_layer
from .shapes import shape_of

BUDGETS = (0.5, 0.25, 0.12)
SEEDS = 5
KEPT = 0.25  # of heads, of neurons
NEAR = Neighborhood(2, "causal")
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


def neuron_plans(calibration: Calibration) -> dict[str, VisualPlan]:
    """A quarter of the neurons in every layer: the most important, the first, random ones."""
    layers, size = calibration.neurons.shape
    kept = int(size * KEPT)

    def plan(order: np.ndarray) -> VisualPlan:
        return VisualPlan(tuple(LayerPlan(ffn=tuple(sorted(row[:kept].tolist()))) for row in order))

    rng = np.random.default_rng(0)
    return {
        "neurons: calibrated": plan(np.argsort(-calibration.neurons, kind="stable")),
        "neurons: first": plan(np.tile(np.arange(size), (layers, 1))),
        "neurons: random": plan(rng.random((layers, size)).argsort()),
        "neurons: inverted": plan(np.argsort(calibration.neurons, kind="stable")),
    }


def peer_plans(calibration: Calibration, probe: Probe) -> dict[str, list[VisualPlan]]:
    """The published methods from cheap to dear; their layers ranked by KL on the samples, their heads by the scores."""
    layers, heads = calibration.heads.shape
    dense = VisualPlan.dense(layers)

    def ranked(layer: LayerPlan) -> list[int]:
        """Layers by what `layer` does to the answers there, least first."""
        return list(np.argsort([probe.divergence(with_layer(dense, index, layer)) for index in range(layers)]))

    frozen, skipped, unread = (
        ranked(layer)
        for layer in (LayerPlan(attention="none", ffn=0.0), LayerPlan(attention="none"), LayerPlan(text_reads=False))
    )
    counts = range(layers + 1)
    yopo = []
    for share in np.linspace(1 / 16, 1, 31):
        masks = keep_heads(calibration.heads, HeadBudget(float(share)), heads).tolist()
        # causal windows: the official ones read ahead, which unmodified weights have never done
        yopo.append(VisualPlan(tuple(LayerPlan(True, NEAR, tuple(mask), float(share)) for mask in masks), "yopo"))
    return {
        "YOPO, uniform": yopo,
        "VTW": [VisualPlan.vtw(layers, count) for count in counts],
        "ViCA": [VisualPlan.vica(layers, unread[::-1][:count]) for count in counts],
        "ShortV": [VisualPlan.shortv(layers, frozen[: layers - count]) for count in counts],
        "V-Skip": [VisualPlan.vskip(layers, skipped[: layers - count]) for count in counts],
    }


def accuracies(target: Target, processor, plans: dict[str, VisualPlan], asked: int, on_step) -> dict[str, dict]:
    """Share of held-out questions answered right under each plan, by kind."""
    right = {name: dict.fromkeys(KINDS, 0.0) for name in plans}
    done, total = 0, len(KINDS) * -(-asked // _CHUNK) * len(plans)
    for kind in KINDS:
        held_out = questions(kind, asked)
        for start in range(0, asked, _CHUNK):
            chunk = held_out[start : start + _CHUNK]
            probe = Probe(target, [encode(processor, Record(q.image, q.text, q.answer)) for q in chunk], 25)
            for name, plan in plans.items():
                right[name][kind] += probe.accuracy(plan) * len(chunk) / asked
                done += 1
                on_step(done, total)
    return right


def compare(model_folder: str, num_samples: int, asked: int, on_step) -> dict:
    """All plans, their cost as a share of dense visual FLOPs, and their accuracy."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    samples = [encode(processor, record) for record in records(TINY, num_samples, None)]
    calibration, target = calibrate(model, samples, data=TINY), Target.of(model)
    probe, shape = Probe(target, samples), shape_of(model)
    layout, length = probe.layouts[0], probe.lengths[0]

    def cost(plan: VisualPlan) -> int:
        return COSTS["visual"](flops(shape, plan, layout=layout, text_tokens=length - layout.num_visual))

    whole = cost(probe.plan)
    front = list(search_front(model, samples, budget=min(BUDGETS), calibration=calibration))
    peers = peer_plans(calibration, probe)
    plans = {"dense": probe.plan} | head_plans(calibration) | neuron_plans(calibration)
    for budget in BUDGETS:
        found = next(point.plan for point in front if point.cost <= budget)
        plans[f"{budget:.0%}: searched"] = found
        for name, family in peers.items():
            plans[f"{budget:.0%}: {name}"] = _spending(family, cost(found), cost)
    right = accuracies(target, processor, plans, asked, on_step)
    return {
        "samples": num_samples,
        "questions": asked,
        "plans": [{"plan": name, "cost": cost(plan) / whole, **right[name]} for name, plan in plans.items()],
    }


def _spending(family: Iterable[VisualPlan], budget: int, cost) -> VisualPlan:
    """The cheapest plan of a family that costs at least `budget`; the dearest one if none does."""
    dear = sorted(family, key=cost)
    return next((plan for plan in dear if cost(plan) >= budget), dear[-1])


def table(rows: list[dict]) -> str:
    """A Markdown table of `compare`'s plans."""
    lines = ["| plan | visual FLOPs | " + " | ".join(KINDS) + " |", "| --- |" + " --- |" * (1 + len(KINDS))]
    for row in rows:
        cells = [row["plan"], f"{row['cost']:.1%}", *(f"{100 * row[kind]:.1f}" for kind in KINDS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/comparison"), metavar="FOLDER")
    parser.add_argument("--model", default=str(checkpoint()), metavar="DIR")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--questions", type=int, default=1000, help="held-out questions of each kind")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with progress("comparing") as step:
        result = compare(given.model, given.samples, given.questions, step)
    (given.out / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
    (given.out / "comparison.md").write_text(table(result["plans"]))
    print(table(result["plans"]), end="")


if __name__ == "__main__":
    main()
