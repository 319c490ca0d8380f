"""Right and wrong answers of several plans to the same held-out questions, so that they are compared question by
question; many questions about one image are in one sequence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vis_sparse.eval.deep.decoder import Decoder
from vis_sparse.eval.deep.model import Model
from vis_sparse.eval.deep.projector import projected
from vis_sparse.eval.deep.sequences import NO_LABEL, Sequences, sequences, visual_places
from vis_sparse.eval.deep.vision import features, seen
from vis_sparse.eval.tiny.data import DIGITS, Scene
from vis_sparse.eval.tiny.dialogs import Turn, asked_of, description, grid_talk, line_says, page_talk, shape_talk
from vis_sparse.eval.tiny.reading import ORDINALS, Page
from vis_sparse.plans.schedule import LayerWork

SEED = 2 * 10**6
CANDIDATES = 8
SHOWN = (("page", "grid", "page"), ("grid", "page", "shape"))  # of a batch; batches take them in turn
LATER, LEANING = "later", "leaning"  # turns of a conversation but the first; those that no one understands without it
KINDS = ("easy_vqa", "place", "count", "exists", "reading", "which_line", "lines", "description", LATER, LEANING)


@dataclass(frozen=True)
class Answers:
    """kinds: of the questions, indices into `KINDS`, one digit each. right: by plan, "1" or "0" for each question; a
    plan that was asked fewer was asked the first ones. visual_flops: by plan, share of the dense plan's."""

    kinds: str
    right: dict[str, str]
    visual_flops: dict[str, float]

    def of(self, plan: str, kind: str, beside: str | None = None) -> np.ndarray:
        """(questions,) bool: what was right of a kind's questions that the plan was asked, and the plan `beside` it
        too. Leaning turns are later ones, too."""
        asked = min(len(self.right[plan]), len(self.right[beside or plan]))
        wanted = {str(KINDS.index(name)) for name in ((LATER, LEANING) if kind == LATER else (kind,))}
        return np.array([right == "1" for right, own in zip(self.right[plan][:asked], self.kinds) if own in wanted])

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(vars(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Answers:
        return cls(**json.loads(file.read_text()))


def examined(rng: np.random.Generator, shown: Scene | Page) -> list[list[Turn]]:
    """Dialogs about an image, more than a sequence holds: a description of every third image, a conversation of four
    turns, and single questions; of a page all that there are, and then another conversation."""
    if isinstance(shown, Page):
        lines = range(len(shown.lines))
        singles = [line_says(shown, line) for line in lines]
        singles += [Turn(f"which line says {shown.lines[line].word}?", ORDINALS[line], "which_line") for line in lines]
        singles += [Turn("how many lines are there?", DIGITS[len(lines)], "lines")]
        talks = [page_talk(rng, shown) for _ in range(2)]
    else:
        singles = list(dict.fromkeys(asked_of(shown)))
        talks = [grid_talk(rng, shown, asked_of(shown)) if shown.cells else shape_talk(rng, shown)]
    told = [turn for turn in [description(shown)] if turn and rng.random() < 1 / 3]
    return [[turn] for turn in told] + talks[:1] + [[turn] for turn in singles] + talks[1:]


def kinds_of(data: Sequences) -> str:
    """Of all turns, one digit each."""
    names = [
        turn.kind if place == 0 else LEANING if turn.leans else LATER
        for turns in data.turns
        for turn, place, _, _ in turns
    ]
    return "".join(str(KINDS.index(name)) for name in names)


def likeliest(decoder: Decoder, hidden: Tensor) -> Tensor:
    """(rows, width) to the rows' likeliest tokens. bf16 logits tie, so the best of them are computed again."""
    found = decoder.logits(hidden).topk(CANDIDATES).indices
    exact = (decoder.embeddings[found].float() @ hidden.float()[..., None])[..., 0]
    return found.gather(1, exact.argmax(dim=1, keepdim=True))[:, 0]


def right_of(data: Sequences, tokens: Tensor) -> str:
    """Of all turns, "1" where all tokens of the answer, and its end, are `tokens`, (targets): the likeliest ones."""
    where = data.targets != NO_LABEL
    correct = torch.ones_like(where)
    correct[where] = tokens == data.targets[where]
    return "".join(
        str(int(row[start:end].all()))
        for row, turns in zip(correct, data.turns, strict=True)
        for _, _, start, end in turns
    )


@dataclass(frozen=True)
class Asked:
    """Dialogs about images, a batch of sequences. embedded: (B, L, width) fp32, visual tokens in their places."""

    data: Sequences
    embedded: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Positions, and what each row sees."""
        return self.data.positions, self.data.visible()

    @property
    def where(self) -> Tensor:
        """(B, L) bool: rows that have a target."""
        return self.data.targets != NO_LABEL

    @property
    def labels(self) -> Tensor:
        """(targets,) int64"""
        return self.data.targets[self.where]


@torch.no_grad()
def asked(model: Model, seed: Sequence[int], shown: Sequence[str], split: str) -> Asked:
    """A batch of the dialogs that are `examined`, a sequence for each of `shown`, about the images of a split."""
    data = sequences(model.tokenizer, np.random.default_rng(seed), shown, (), split=split, asked=examined)
    with torch.autocast("cpu", torch.bfloat16):
        visual = projected(model.projector, features(model.tower, seen(data.images).pixels)[0])
    embedded = model.decoder.embeddings[data.ids].float()
    return Asked(data, embedded.masked_scatter(visual_places(data.ids)[..., None], visual.float()))


@torch.no_grad()
def answered(
    model: Model, dense: Sequence[LayerWork], works: dict[str, Sequence[LayerWork]], parts: range
) -> Iterator[tuple[str, dict[str, str]]]:
    """For each batch its `kinds_of`, and `right_of` by plan.

    model: with a `PlannedDecoder`. dense: the dense plan's work; a plan's first layers that are dense are computed once
    for all plans.
    """
    decoder = model.decoder
    for part in parts:
        found, kept = asked(model, [SEED, part], SHOWN[part % len(SHOWN)], "test"), []
        decoder.work = dense
        whole = decoder.rest(decoder.lanes(found.embedded), *found.inputs, kept=kept)
        right = {}
        for name, work in works.items():
            common = next((i for i, pair in enumerate(zip(work, dense)) if pair[0] != pair[1]), None)
            decoder.work = work
            hidden = whole if common is None else decoder.rest(kept[common], *found.inputs, first=common)
            right[name] = right_of(found.data, likeliest(decoder, hidden[found.where]))
        yield kinds_of(found.data), right
