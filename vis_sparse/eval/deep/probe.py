"""What plans change about the deep model's answers, for a search: many questions about one image in one sequence, and
the training's decoder in bf16. `calibration.probe` asks one at a time, which costs some seven times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vis_sparse.eval.deep.answers import KINDS, LATER, LEANING, Asked, asked, kinds_of
from vis_sparse.eval.deep.front import work_of
from vis_sparse.eval.deep.model import Model
from vis_sparse.eval.deep.planned import Lanes
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.schedule import LayerWork

SEED = 5 * 10**6
SHOWN = ("page", "grid", "shape")  # of a batch


@dataclass
class _Batch:
    """asked: questions about training images. dense: (targets, vocabulary) log-probabilities of the dense plan, fp16.
    question: (targets,) int64, whose answer a target is of. kinds: of the questions. kept: what enters each layer under
    the current plan."""

    asked: Asked
    dense: Tensor
    question: Tensor
    kinds: np.ndarray
    kept: list[Lanes]


class PackedProbe:
    """Takes a `calibration.probe.Probe`'s place in `PlanLosses`. KL and accuracy are means over the questions of a
    kind, and then over the kinds: one with few questions counts as much as another.

    model: with a `PlannedDecoder`. batches: of three images and some 40 questions each.
    """

    @torch.no_grad()
    def __init__(self, model: Model, batches: int):
        self.plan = VisualPlan.dense(model.decoder.config.num_hidden_layers)
        self._model = model
        self._batches = [self._observed(part) for part in range(batches)]

    def _observed(self, part: int) -> _Batch:
        found, kept = asked(self._model, [SEED, part], SHOWN, "train"), []
        targets = self._targets(found, self.plan, kept=kept)
        question = torch.full_like(found.where, -1, dtype=torch.long)
        spans = [(row, *turn[2:]) for row, turns in enumerate(found.data.turns) for turn in turns]
        for number, (row, start, end) in enumerate(spans):
            question[row, start:end] = number
        kinds = np.array([KINDS[int(digit)] for digit in kinds_of(found.data)])
        kinds[kinds == LEANING] = LATER
        return _Batch(found, targets.log_softmax(-1).half(), question[found.where], kinds, kept)

    def _targets(self, found: Asked, plan: VisualPlan, first: int = 0, lanes: Lanes | None = None, **options) -> Tensor:
        """fp32 logits of the answers' tokens under a plan, from layer `first` on."""
        decoder = self._model.decoder
        decoder.work = work_of(plan)
        lanes = decoder.lanes(found.embedded) if lanes is None else lanes
        hidden = decoder.rest(lanes, *found.inputs, first=first, **options)
        return decoder.logits(hidden[found.where]).float()

    @property
    def num_samples(self) -> int:
        return sum(len(batch.kinds) for batch in self._batches)

    def all_work(self, plan: VisualPlan) -> tuple[LayerWork, ...]:
        return work_of(plan)

    def _first_change(self, plan: VisualPlan) -> int | None:
        pairs = enumerate(zip(work_of(plan), work_of(self.plan), strict=True))
        return next((layer for layer, (new, old) in pairs if new != old), None)

    @torch.no_grad()
    def adopt(self, plan: VisualPlan) -> None:
        """Make `plan` the current one."""
        first = self._first_change(plan)
        if first is not None:
            for batch in self._batches:
                kept = []
                self._targets(batch.asked, plan, first, batch.kept[first], kept=kept)
                batch.kept[first:] = kept
        self.plan = plan

    @torch.no_grad()
    def measure(self, plan: VisualPlan, every: int = 1) -> tuple[float, float]:
        """(KL(dense || plan) in nats of an answer's tokens, whole answers right) on every so manieth batch."""
        first = self._first_change(plan)
        first = plan.num_layers - 1 if first is None else first
        found = [self._measured(batch, plan, first) for batch in self._batches[::every]]
        kinds, kl, right = (np.concatenate(column) for column in zip(*found, strict=True))
        return tuple(
            float(np.mean([values[kinds == kind].mean() for kind in np.unique(kinds)])) for values in (kl, right)
        )

    def _measured(self, batch: _Batch, plan: VisualPlan, first: int) -> Sequence[np.ndarray]:
        logits = self._targets(batch.asked, plan, first, batch.kept[first])
        kl = F.kl_div(logits.log_softmax(-1), batch.dense.float(), reduction="none", log_target=True).sum(-1)
        wrong = (logits.argmax(-1) != batch.asked.labels).float()
        sums = torch.zeros(3, len(batch.kinds)).index_add(
            1, batch.question, torch.stack([kl, wrong, torch.ones_like(kl)])
        )
        return batch.kinds, (sums[0] / sums[2]).double().numpy(), (sums[1] == 0).numpy()
