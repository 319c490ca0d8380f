"""`python -m vis_sparse.eval.comparison --model llava`: calibrates and searches on training images, asks held-out ones.

Writes a JSON file, its tables as Markdown, and the searched plans. Stopped and started again, the search goes on from
its log, which is also why a second run with other settings of the questions does not search again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...calibration.measure import calibrate
from ...calibration.profiles import Target
from ...calibration.samples import encode
from ...cost.shape_lookup import shape_of
from ...plans.plan import VisualPlan
from ...searching.pareto import described
from ...searching.published import chains
from ...searching.search import best_within, meter_of, search_front
from ..data import TINY, records
from ..progress import progress
from ..timing import machine_facts
from ..tiny import checkpoint
from . import tables
from .answers import SCORED, Answers, Layers, answers
from .paired import holm, mcnemar, only_one_right
from .plans import BUDGETS, Field, add_budget, add_heads, add_neurons

PARTS_ASKED = 1000  # questions of each kind at most for the plans of heads and neurons, whose differences are large


def compare(family: str, num_samples: int, asked: int, out: Path, on_step) -> Iterator[dict]:
    """Searched plans against published methods, then calibrated heads and neurons against others, on a shipped model.

    Yields what is known after each of the two.
    """
    folder, data = checkpoint(family), next(name for name, of in TINY.items() if of == family)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    samples = [encode(processor, record) for record in records(data, num_samples, None)]
    calibration, target, log = calibrate(model, samples, data=data), Target.of(model), out / f"{family}.log"
    # on its way to the last budget a search finds what it would find for the others
    points = list(search_front(model, samples, budget=min(BUDGETS), calibration=calibration, log=log))
    searched = {budget: best_within(points, budget) for budget in BUDGETS}
    for budget, found in searched.items():
        (out / f"{family}-{budget:.0%}.yaml").write_text(described(found, "visual").to_yaml())
    meter = meter_of(model, samples, log=log)

    def loss(plan: VisualPlan) -> float:
        return meter(plan).kl

    def asked_about(field: Field, asked: int) -> dict:
        given = answers(target, processor, field.plans.values(), asked, on_step)
        return {"questions": asked, "plans": scored(field, given, meter.cost), "pairs": paired(field, given)}

    parts, budgets = Field({"dense": meter.dense}), Field({"dense": meter.dense})
    add_heads(parts, calibration)
    add_neurons(parts, calibration)
    methods = chains(calibration.heads, shape_of(model).kv_heads, loss)
    for budget, found in searched.items():
        add_budget(budgets, budget, found.plan, methods, meter.cost, loss)
    known = {"model": family, "samples": num_samples, **machine_facts(model.device)}
    for section, field, most in (("budgets", budgets, asked), ("parts", parts, min(asked, PARTS_ASKED))):
        known[section] = asked_about(field, most)
        yield known


def scored(field: Field, given: dict[Layers, Answers], cost: Callable[[VisualPlan], float]) -> list[dict]:
    """What plans cost as a share of dense visual FLOPs, their shares of right answers, and KL to dense."""
    rows = []
    for name, plan in field.plans.items():
        own = given[plan.layers]
        scores = {name: own.score(name) for name in SCORED}
        layers = [str(layer) for layer in plan.layers]
        rows.append({"plan": name, "cost": cost(plan), **scores, "kl": own.kl, "layers": layers})
    return rows


def paired(field: Field, given: dict[Layers, Answers]) -> list[dict]:
    """Plans against each of their rivals on each kind of questions; p corrected for all comparisons of one plan."""
    return [row for plan in field.rivals for row in _against_rivals(field, plan, given)]


def _against_rivals(field: Field, plan: str, given: dict[Layers, Answers]) -> list[dict]:
    rows = []
    for rival in field.rivals[plan]:
        ours, theirs = (given[field.plans[name].layers] for name in (plan, rival))
        for kind in SCORED:
            only = only_one_right(ours.to(kind), theirs.to(kind))
            rows.append({"plan": plan, "rival": rival, "kind": kind, "only_plan": only[0], "only_rival": only[1]})
    raw = [mcnemar(row["only_plan"], row["only_rival"]) for row in rows]
    return [row | {"p": p, "p_holm": corrected} for row, p, corrected in zip(rows, raw, holm(raw))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/comparison"), metavar="FOLDER")
    parser.add_argument("--model", choices=list(TINY.values()), default="llava")
    parser.add_argument("--samples", type=int, default=2048, help="training questions that calibration and search see")
    parser.add_argument("--questions", type=int, default=1000, help="held-out questions of each kind")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with progress("comparing") as step:
        for result in compare(given.model, given.samples, given.questions, given.out, step):
            (given.out / f"{given.model}.json").write_text(json.dumps(result, indent=2) + "\n")
    sections = (result[name] for name in ("budgets", "parts"))
    text = "\n".join(
        table for each in sections for table in (tables.scores(each["plans"]), tables.pairs(each["pairs"]))
    )
    (given.out / f"{given.model}.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
