"""What plans answer to held-out questions, question by question."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ...calibration.probe import Probe
from ...calibration.profiles import Target
from ...calibration.records import Record
from ...calibration.samples import encode
from ...calibration.vision import Vision
from ...plans.layer_plan import LayerPlan
from ...plans.plan import VisualPlan
from ..tiny.data import KINDS
from ..tiny.dialogs import questions
from ..tiny.families import family_of, kinds_of

_CHUNK = 125  # questions whose states are held at once

Computed = tuple[tuple[LayerPlan, ...], VisualPlan | None]

# What is scored: every kind of questions, and the task that three of them make up.
SCORED = {kind: (kind,) for kind in KINDS} | {"digit grid": KINDS[1:]}


def computed(plan: VisualPlan) -> Computed:
    """What a plan computes, whatever it is called: its decoder's layers, and its tower."""
    return plan.layers, plan.tower


@dataclass(frozen=True)
class Answers:
    """right: by kind, (questions,) bool, whether all tokens of the answer are the likeliest ones, which is what greedy
    `generate` gives. kl: KL(dense || plan) at the answers' tokens in nats, mean over all questions."""

    right: dict[str, np.ndarray]
    kl: float

    def to(self, scored: str) -> np.ndarray:
        """(questions,) bool: which questions of a name in `SCORED` are answered right."""
        return np.concatenate([self.right[kind] for kind in SCORED[scored]])

    def score(self, scored: str) -> float:
        """Share of right answers."""
        return float(self.to(scored).mean())


def answers(
    target: Target,
    processor,
    plans: Iterable[VisualPlan],
    asked: int,
    on_step: Callable[[int, int], None],
    vision: Vision | None = None,
) -> dict[Computed, Answers]:
    """The answers of plans, by what they compute, to the first `asked` held-out questions of each kind.

    vision: the model's vision encoder, for plans with a tower section. on_step(done, total): called after each piece of
    the work.
    """
    family = family_of(target.model)
    kinds = kinds_of(family)
    different = list({computed(plan): plan for plan in plans}.values())
    right: dict[Computed, dict[str, list]] = {computed(plan): {kind: [] for kind in kinds} for plan in different}
    kl: dict[Computed, list] = {computed(plan): [] for plan in different}
    done, total = 0, len(kinds) * -(-asked // _CHUNK) * len(different)
    for kind in kinds:
        held_out = questions(kind, asked, sizes=family.SIZES)
        for start in range(0, asked, _CHUNK):
            chunk = held_out[start : start + _CHUNK]
            probe = Probe(target, [encode(processor, Record(q.image, q.text, q.answer)) for q in chunk], 25, vision)
            for plan in different:
                divergences, correct = probe.per_sample(plan)
                right[computed(plan)][kind].append(correct)
                kl[computed(plan)].append(divergences)
                done += 1
                on_step(done, total)

    def merged(key: Computed) -> Answers:
        return Answers(
            {kind: np.concatenate(parts) for kind, parts in right[key].items()},
            float(np.concatenate(kl[key]).mean()),
        )

    return {key: merged(key) for key in right}
