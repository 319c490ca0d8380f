"""Training sequences of one length: a chat's beginning with an image or without, then slots, each a dialog of its own.

A slot sees the beginning and itself, and its positions go on from the beginning's: each dialog is computed as if it
were alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vis_sparse.eval.tiny.data import Scene, easy_vqa_scenes, grid_scene
from vis_sparse.eval.tiny.dialogs import Turn, asked_of, description, grid_talk, page_talk, page_turn, shape_talk
from vis_sparse.eval.tiny.model_smol import (
    IMAGE,
    VISUAL_TOKENS,
    end_of_answer,
    end_of_question,
    image_prefix,
    text_prefix,
)
from vis_sparse.eval.tiny.reading import WORDS, Page, page
from vis_sparse.eval.tiny.train import mirrored

LENGTH = 416
NO_LABEL, PAD = -100, 2
BEGINNING = -1
# Of the tokens in the loss: an answer's, a sentence's, what ends an answer, a chat's without an image.
ANSWER, SENTENCE, END, CHAT = 1.0, 0.5, 0.3, 0.1


@dataclass(frozen=True)
class Sequences:
    """ids, targets, positions, slots: (B, LENGTH) int64; weights: (B, LENGTH) fp32, of the targets in the loss; images:
    the shown ones, in the order of the sequences that have one; turns: each sequence's, with its number in the dialog
    and where its targets are."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    slots: Tensor
    weights: Tensor
    images: tuple[Scene | Page, ...]
    turns: tuple[list[tuple[Turn, int, int, int]], ...]

    def visible(self) -> Tensor:
        """(B, 1, L, L) bool: which row (query) sees which column (key)."""
        beginning = self.slots[:, None, :] == BEGINNING
        same = self.slots[:, :, None] == self.slots[:, None, :]
        length = self.slots.shape[1]
        return ((beginning | same) & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


class Writer:
    """Fills one sequence."""

    def __init__(self, tokenizer, beginning: Sequence[int]):
        self.tokenizer, self.start = tokenizer, len(beginning)
        self.ids, self.positions = list(beginning), list(range(len(beginning)))
        self.slots, self.weights = [BEGINNING] * len(beginning), [0.0] * len(beginning)
        self.number, self.turns = 0, []

    def add(self, turns: Sequence[Turn | tuple[str, list[int]]]) -> bool:
        """A slot with a dialog, if there is room: turns, or texts with the ids of their answers."""
        ids, weights, spans = [], [], []
        for number, turn in enumerate(turns):
            if number:
                ids += end_of_answer(self.tokenizer)
            if isinstance(turn, Turn):
                answer, weight = encoded(self.tokenizer, turn.answer), SENTENCE if " " in turn.answer else ANSWER
                question, end = turn.text, [self.tokenizer.eos_token_id]
            else:
                (question, answer), weight, end = turn, CHAT, []
            asked = encoded(self.tokenizer, question) + end_of_question(self.tokenizer)
            ids += asked + answer + end
            weights += [0.0] * (len(ids) - len(weights) - len(answer) - len(end))
            weights += [weight] * len(answer) + [END] * len(end)
            before = len(self.ids) + len(ids) - 1
            spans.append((turn, number, before - len(answer) - len(end), before))
        if len(self.ids) + len(ids) > LENGTH:
            return False
        self.positions += range(self.start, self.start + len(ids))
        self.ids += ids
        self.weights += weights
        self.slots += [self.number] * len(ids)
        self.number += 1
        self.turns += spans
        return True

    def rows(self) -> tuple[list[int], list[int], list[int], list[int], list[float]]:
        """ids, targets, positions, slots, weights; a target is the next token of the slot, its weight with it."""
        empty = LENGTH - len(self.ids)
        ids = self.ids + [PAD] * empty
        weights = self.weights[1:] + [0.0] * (empty + 1)
        targets = [wanted if weight else NO_LABEL for wanted, weight in zip([*ids[1:], PAD], weights, strict=True)]
        return ids, targets, self.positions + [0] * empty, self.slots + [self.number] * empty, weights


_CACHE: dict[str, list[int]] = {}


def encoded(tokenizer, text: str) -> list[int]:
    if text not in _CACHE:
        _CACHE[text] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _CACHE[text]


def sequences(
    tokenizer,
    rng: np.random.Generator,
    kinds: Sequence[str],
    chats: Sequence[tuple[str, list[int]]],
    split: str = "train",
    asked: Callable[[np.random.Generator, Scene | Page], list[list[Turn]]] | None = None,
) -> Sequences:
    """One sequence for each of `kinds`: "shape", "grid", "page", or "chat" (some of `chats`: texts, ids of answers).

    asked(rng, image): other dialogs than `dialogs`.
    """
    rows, images, turns = [], [], []
    for kind in kinds:
        if kind == "chat":
            writer = Writer(tokenizer, text_prefix(tokenizer))
            for i in rng.permutation(len(chats)):
                if not writer.add([chats[i]]) and len(writer.ids) > LENGTH - 60:
                    break
        else:
            writer, shown = Writer(tokenizer, image_prefix(tokenizer)), image(rng, kind, split)
            images.append(shown)
            for dialog in (asked or dialogs)(rng, shown):
                writer.add(dialog)
        rows.append(writer.rows())
        turns.append(writer.turns)
    ids, targets, positions, slots, weights = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Sequences(ids, targets, positions, slots, weights, tuple(images), tuple(turns))


def image(rng: np.random.Generator, kind: str, split: str) -> Scene | Page:
    if kind == "page":
        return page(rng, split, WORDS)
    if kind == "grid":
        return grid_scene(rng, 24, split)
    known = easy_vqa_scenes(split)
    scene = known[rng.integers(len(known))]
    return mirrored(scene, rng) if split == "train" else scene


def dialogs(rng: np.random.Generator, shown: Scene | Page) -> list[list[Turn]]:
    """More dialogs than a sequence holds, in the order in which they are tried."""
    if isinstance(shown, Page):
        singles, talks = [page_turn(rng, shown) for _ in range(12)], [page_talk(rng, shown) for _ in range(2)]
    elif shown.cells:
        singles = asked_of(shown)[:14]
        talks = [grid_talk(rng, shown, asked_of(shown)[14:]) for _ in range(2)]
    else:
        singles, talks = asked_of(shown), [shape_talk(rng, shown) for _ in range(2)]
    told = [[turn] for turn in [description(shown)] if turn]
    rest = [[turn] for turn in dict.fromkeys(singles)]
    return told + talks[:1] + rest + talks[1:]


def visual_places(ids: Tensor) -> Tensor:
    """Where visual tokens go: (B, L) bool; each row with an image has `VISUAL_TOKENS`."""
    places = ids == IMAGE
    assert set(places.sum(dim=1).tolist()) <= {0, VISUAL_TOKENS}
    return places
