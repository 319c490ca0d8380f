"""Right answers to questions about held-out images, many in one sequence."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import distributed

from vis_sparse.eval.deep.model import Model
from vis_sparse.eval.deep.projector import projected
from vis_sparse.eval.deep.run import rank
from vis_sparse.eval.deep.sequences import NO_LABEL, sequences
from vis_sparse.eval.deep.vision import features, seen

SEED = 10**6
SHOWN = ("grid", "page", "shape")
KINDS = (
    "easy_vqa", "place", "count", "exists", "reading", "first", "later", "leaning", "which_line", "lines", "beside",
    "description",
)  # fmt: skip


@torch.no_grad()
def counted(model: Model, number: int, shown: Sequence[str] = SHOWN) -> dict[str, tuple[int, int]]:
    """Of the turns in `number` batches of a process, one sequence for each of `shown`: right ones and all by kind.

    Right is an answer whose tokens, and its end, are the likeliest next ones each: what greedy `generate` says. Also of
    the `first` turns of dialogs of several, the `later` ones, and those that lean on one before (`leaning`).
    """
    right, asked = Counter(), Counter()
    for part in range(number):
        rng = np.random.default_rng([SEED, part, rank()])
        data = sequences(model.tokenizer, rng, shown, (), split="test")
        with torch.autocast("cpu", torch.bfloat16):
            visual = projected(model.projector, features(model.tower, seen(data.images).pixels)[0])
        where = data.targets != NO_LABEL
        correct = torch.ones_like(where)
        correct[where] = model.answers(data, visual).argmax(dim=-1) == data.targets[where]
        for row, turns in zip(correct, data.turns, strict=True):
            for index, (turn, place, start, end) in enumerate(turns):
                names = [turn.kind] + ["later"] * (place > 0) + ["leaning"] * turn.leans
                names += ["first"] * (place == 0 and index + 1 < len(turns) and turns[index + 1][1] > 0)
                asked.update(names)
                if row[start:end].all():
                    right.update(names)
    counts = torch.tensor([[right[name], asked[name]] for name in KINDS])
    if distributed.is_initialized():
        distributed.all_reduce(counts)
    return {name: (good, every) for name, (good, every) in zip(KINDS, counts.tolist(), strict=True) if every}


def shares(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    return {name: round(right / asked, 4) for name, (right, asked) in counts.items()}
