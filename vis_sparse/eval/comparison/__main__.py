"""`python -m vis_sparse.eval.comparison --model llava`: calibrates and searches on training images, asks held-out ones.

Writes a JSON file, its tables as Markdown, and the searched plans. Stopped and started again, the search goes on from
its log, which is also why a second run with other settings of the questions does not search again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from ...calibration.profiles import Target
from ...cost.shape_lookup import shape_of
from ...plans.plan import VisualPlan
from ...searching.pareto import described
from ...searching.published import chains
from ...searching.search import best_within, meter_of, search_front
from ..data import TINY
from ..progress import progress
from ..timing import machine_facts
from . import tables
from .answers import answers
from .plans import BUDGETS, Field, add_budget, add_heads, add_neurons
from .rows import paired, scored
from .setup import Setup
from .whole import named, whole

PARTS_ASKED = 1000  # questions of each kind at most for the plans of heads and neurons, whose differences are large


def of_decoder(setup: Setup) -> Iterator[dict]:
    """Searched plans of the decoder against published methods, then calibrated heads and neurons against others.

    Yields what is known after each of the two.
    """
    model, samples, calibration, log = setup.model, setup.samples, setup.calibration, setup.file(".log")
    settings = {"calibration": calibration, "time_limit": setup.time_limit, "log": log}
    # on its way to the last budget a search finds what it would find for the others
    points = list(search_front(model, samples, budget=min(BUDGETS), **settings))
    searched = {budget: best_within(points, budget) for budget in BUDGETS}
    for budget, found in searched.items():
        setup.file(f"-{budget:.0%}.yaml").write_text(described(found, "visual").to_yaml())
    meter = meter_of(model, samples, log=log)

    def loss(plan: VisualPlan) -> float:
        return meter(plan).kl

    def asked_about(field: Field, asked: int) -> dict:
        given = answers(Target.of(model), setup.processor, field.plans.values(), asked, setup.on_step)
        return {"questions": asked, "plans": scored(field, given, meter.cost), "pairs": paired(field, given)}

    parts, budgets = Field({"dense": meter.dense}), Field({"dense": meter.dense})
    add_heads(parts, calibration)
    add_neurons(parts, calibration)
    methods = chains(calibration.heads, shape_of(model).kv_heads, loss)
    for budget, found in searched.items():
        add_budget(budgets, budget, found.plan, methods, meter.cost, loss)
    known = {}
    for section, field, most in (("budgets", budgets, setup.asked), ("parts", parts, min(setup.asked, PARTS_ASKED))):
        known[section] = asked_about(field, most)
        yield known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/comparison"), metavar="FOLDER")
    parser.add_argument("--model", choices=list(TINY.values()), default="llava")
    parser.add_argument("--samples", type=int, default=2048, help="training questions that calibration and search see")
    parser.add_argument("--questions", type=int, default=1000, help="held-out questions of each kind")
    parser.add_argument("--all", action="store_true", help="budgets of all visual computation, vision encoder included")
    parser.add_argument("--plans", metavar="NAMES", help="plans with commas between them against dense: no search")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="of each search")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with progress("comparing") as step:
        settings = {"asked": given.questions, "time_limit": given.time_limit, "out": given.out, "on_step": step}
        names = given.plans.split(",") if given.plans else []
        setup = Setup.of(given.model, given.samples, given.all or bool(names), **settings)
        facts = {"model": given.model, "samples": given.samples, **machine_facts(setup.model.device)}
        ending = "-plans" if names else "-all" if given.all else ""
        results = [named(setup, names)] if names else (whole if given.all else of_decoder)(setup)
        for result in results:
            setup.file(f"{ending}.json").write_text(json.dumps(facts | result, indent=2) + "\n")
    sections = (result[name] for name in ("budgets", "parts") if name in result)
    text = "\n".join(
        table for each in sections for table in (tables.scores(each["plans"]), tables.pairs(each["pairs"]))
    )
    setup.file(f"{ending}.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
