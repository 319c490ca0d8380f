"""transformers' Trainer with the loss at the answers' rows: of the labels, and of the dense model's answers.

The LM head runs on those rows alone. Over all rows of a batch its products and logits would be a tenth of a step under
a plan that leaves a tenth of the decoder, and most of its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainerCallback

from ..calibration.samples import NO_LABEL
from ..patches import is_patched, unpatched, use_prompt
from ..patches.family import prompt_ends
from .conversations import Conversation
from .encoding import Encoder
from .teacher import Teacher, divergence

TAUGHT = ("taught_ids", "taught_log_probabilities")


class Numbered(Dataset):
    """Conversations with their numbers, by which a teacher knows them; held-out ones have none."""

    def __init__(self, conversations: Sequence[Conversation], held_out: bool = False):
        self._conversations, self._held_out = conversations, held_out

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> tuple[int | None, Conversation]:
        return None if self._held_out else index, self._conversations[index]


class Collator:
    """Batches of numbered conversations, with what a teacher says at the rows that predict answers, if there is one."""

    def __init__(self, encoder: Encoder, teacher: Teacher | None = None):
        self._encoder, self._teacher = encoder, teacher

    def __call__(self, numbered: Sequence[tuple[int | None, Conversation]]) -> dict[str, torch.Tensor]:
        inputs = self._encoder([conversation for _, conversation in numbered])
        if self._teacher is None or numbered[0][0] is None:
            return inputs
        counts = (inputs["labels"][:, 1:] != NO_LABEL).sum(1).tolist()
        said = [self._teacher.of(index, count) for (index, _), count in zip(numbered, counts)]
        joined = (torch.from_numpy(np.concatenate(each)) for each in zip(*said))
        return inputs | dict(zip(TAUGHT, joined))


class PlanTrainer(Trainer):
    """distill: weight of the divergence from the teacher beside the cross-entropy of the labels."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args, distill: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self._distill = distill
        self.model_accepts_loss_kwargs = True  # the loss is a sum over the tokens of a whole step, divided by them

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the answers' tokens of the step. Outputs: `right` (batch, 2), whether all of a sample's answer
        tokens are the likeliest, and the share that are."""
        inputs = dict(inputs)
        labels, taught = inputs.pop("labels"), [inputs.pop(name, None) for name in TAUGHT]
        following = F.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
        is_answer = following != NO_LABEL
        columns = is_answer.any(0).nonzero()[:, 0]
        base = self.accelerator.unwrap_model(self.model)
        with use_prompt(base, prompt_ends(labels)) if is_patched(base) else nullcontext():
            logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
        wanted, chosen = is_answer[:, columns], following[:, columns]
        rows = logits[wanted].float()
        losses = F.cross_entropy(rows, chosen[wanted], reduction="none")
        if self._distill and taught[0] is not None:
            losses = torch.lerp(losses, divergence(rows, *taught), self._distill)
        count = wanted.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        if not return_outputs:
            return loss
        right = (logits.argmax(-1) == chosen) & wanted
        counts = wanted.sum(1).clamp_min(1)
        return loss, {"right": torch.stack([(right | ~wanted).all(1).float(), right.sum(1) / counts], 1)}


class EvaluatedBefore(TrainerCallback):
    """Evaluates before the first step: dense, then under the plan.

    Not before `train` is called: accelerate takes a model that was evaluated for a prepared one, and several processes
    would then train without sharing gradients.
    """

    def __init__(self, trainer: PlanTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            with unpatched(self._trainer.accelerator.unwrap_model(self._trainer.model)):
                self._trainer.evaluate(metric_key_prefix="dense")
            self._trainer.evaluate()


def shares(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics of an evaluation. A greedy answer is right iff each of its tokens is the likeliest after those before."""
    answers, tokens = np.asarray(prediction.predictions).mean(0).tolist()
    return {"answers_right": answers, "tokens_right": tokens}

