"""Exact-match accuracy through greedy `generate`."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from vis_sparse.eval.tiny.data import Question
from vis_sparse.eval.tiny.families import family_of

MAX_ANSWER_TOKENS = 4


@torch.no_grad()
def score(
    model,
    processor,
    questions: Sequence[Question],
    batch_size: int = 32,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Share of questions answered exactly, by kind, in 0..1.

    The model answers through its ordinary greedy `generate`, in batches padded by the processor (on the left). An
    answer counts only if the generated words, special tokens apart, are the expected ones and nothing else.
    `on_batch(done, total)` is called after each batch.
    """
    right, asked = defaultdict(int), defaultdict(int)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        for question, words in zip(batch, answers(model, processor, batch), strict=True):
            asked[question.kind] += 1
            right[question.kind] += words == question.answer
        if on_batch is not None:
            on_batch(start + len(batch), len(questions))
    return {kind: right[kind] / asked[kind] for kind in asked}


@torch.no_grad()
def answers(model, processor, questions: Sequence[Question]) -> list[str]:
    """The words that greedy `generate` gives for one batch of questions."""
    inputs = prepared(model, processor, questions)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def prepared(model, processor, questions: Sequence[Question]):
    """The model's inputs for a batch of questions."""
    return processor(
        images=[question.image for question in questions],
        text=[family_of(model).prompt(question.text) for question in questions],
        padding=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
