"""Trains the deep model after its first stage: `python -m torch.distributed.run --standalone --nproc-per-node 2 -m
vis_sparse.eval.deep.train --stage whole --minutes 65 --out FOLDER`.

`train_vision` has trained the tower alone. Stage `whole` gives the projector its first weights, without the decoder,
and trains low-rank differences of the decoder, projector and tower on dialogs, with the tower's own losses kept. Then
`eyes` trains the tower and the projector alone, towards the same word embeddings, so that the decoder understands them
as before, and `again` the whole model once more.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from vis_sparse.eval.deep import texts, train_vision
from vis_sparse.eval.deep.decoder import Decoder
from vis_sparse.eval.deep.export import SHIPPED, weights_of
from vis_sparse.eval.deep.model import PARTS, Model, answer_loss, tower_losses
from vis_sparse.eval.deep.projector import fit, polish
from vis_sparse.eval.deep.run import STATE, Run, Schedule, join, rank, rounded, world
from vis_sparse.eval.deep.scoring import counted, shares
from vis_sparse.eval.deep.sequences import sequences
from vis_sparse.eval.deep.vision import Seen, features, head_accuracy, head_losses, seen
from vis_sparse.eval.tiny import smollm2

SEED = 2
# What a process's sequences show; processes take them in turn.
MIXES = (("grid", "page", "grid"), ("page", "shape", "page"), ("page", "grid", "chat"), ("grid", "page", "shape"))
# For the tower's own losses: easy-VQA, grids, pages, full pages, in a step of the whole model and in one of the tower.
EXTRA_IMAGES, TOWER_IMAGES = (0, 2, 1, 4), (1, 4, 2, 8)
HEAD_WEIGHT, WORD_WEIGHT, WORD_WEIGHT_ALONE = 0.5, 0.1, 1.0
HELD_OUT_IMAGES = (16, 32, 80, 0)
FIT_BATCHES, POLISH_STEPS = 24, 150
HEADS_STEPS, HEADS_RATE = 400, 1e-2
LOG_STEPS, HELD_OUT_ROUNDS = 5, 8  # of the whole model
TOWER_ROUND = 20  # steps of the tower alone that count as one of the whole model


@dataclass(frozen=True)
class Stage:
    """every: one of so many steps trains the whole model, and the others the tower and the projector alone, since
    reading comes last; None: no step trains the whole. rates: of the parts. after: the stage whose weights it begins
    with, or with what is shipped where that was not run."""

    every: int | None
    rates: dict[str, float]
    decay: float
    after: str


STAGES = {
    "whole": Stage(3, {"lora": 1e-3, "projector": 3e-4, "tower": 2e-3}, decay=0.5, after="vision"),
    "eyes": Stage(None, {"lora": 0.0, "projector": 3e-4, "tower": 2e-3}, decay=0.7, after="whole"),
    "again": Stage(3, {"lora": 7e-4, "projector": 2e-4, "tower": 1e-3}, decay=0.8, after="eyes"),
}


def shown_to(tower: CLIPVisionModel) -> list[tuple[Tensor, Tensor, Seen]]:
    """Batches of images and what `features` makes of them."""
    parts = []
    for number in range(FIT_BATCHES):
        shown = seen(train_vision.images(np.random.default_rng([SEED, number]), (2, 8, 14, 4)))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts.append((*(found.float() for found in features(tower, shown.pixels)), shown))
    return parts


def first_projector(model: Model) -> list[float]:
    """Give the projector its first weights, for the tower as it is; its losses meanwhile."""
    parts = [(found, shown) for found, _, shown in shown_to(model.tower)]
    wanted = [model.words.targets(shown.labels) for _, shown in parts]
    kept = [(found[known], target[known]) for (found, _), (target, known) in zip(parts, wanted, strict=True)]
    fit(model.projector, *(torch.cat(column) for column in zip(*kept, strict=True)))
    return list(polish(model.projector, model.words, parts, POLISH_STEPS))


def first_heads(model: Model) -> list[float]:
    """Give the tower's heads weights for the tower as it is; their losses meanwhile."""
    parts, losses = shown_to(model.tower), []
    optimizer = torch.optim.AdamW(model.heads.parameters(), lr=HEADS_RATE, weight_decay=0.0)
    for step in range(HEADS_STEPS):
        optimizer.param_groups[0]["lr"] = HEADS_RATE * (1 - step / HEADS_STEPS)
        found, half, shown = parts[step % len(parts)]
        loss = sum(head_losses(model.heads(found, half), shown.labels).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


FIRST = {"projector": first_projector, "heads": first_heads}  # what a stage may begin without


def begin(model: Model, folder: Path, before: str) -> dict[str, list[float]]:
    """Weights of the stage before, and first ones for the part that it does not have; that part's losses."""
    weights = weights_of(folder, before if (folder / before / STATE).exists() else SHIPPED)
    model.load(weights)
    model.decoder.refresh()
    missing = [part for part in PARTS if not any(name.startswith(f"{part}.") for name in weights)]
    return {part: FIRST[part](model) for part in missing if part in FIRST}


def train(folder: Path, name: str, minutes: float) -> None:
    stage = STAGES[name]
    chats = texts.answered(folder / "texts.json") if stage.every else ()
    model, before = Model(lambda state: Decoder(smollm2.config(), state)), {}
    if not (folder / name / STATE).exists():
        before = begin(model, folder, stage.after)
    run = Run(folder / name, Schedule(minutes, decay=stage.decay), model.groups(stage.rates))
    for part, losses in before.items():
        run.log(stage=part, loss=rounded({"first": losses[0], "last": losses[-1]}))
    model.decoder.refresh()
    model.decoder.compile_pointwise()
    held_out = seen(train_vision.images(np.random.default_rng(1), HELD_OUT_IMAGES, "test"))

    def loss():
        rng = np.random.default_rng([SEED, list(STAGES).index(name), run.step, rank()])
        if not stage.every or run.step % stage.every:
            _, words, heads = tower_losses(model, seen(train_vision.images(rng, TOWER_IMAGES)))
            return {"words_alone": WORD_WEIGHT_ALONE * words, "heads_alone": heads}
        mix = MIXES[(run.step // stage.every * world() + rank()) % len(MIXES)]
        data = sequences(model.tokenizer, rng, mix, chats)
        # the images of the sequences first
        visual, words, heads = tower_losses(model, seen([*data.images, *train_vision.images(rng, EXTRA_IMAGES)]))
        return {
            "answers": answer_loss(model, data, visual[: len(data.images)]),
            "words": WORD_WEIGHT * words,
            "heads": HEAD_WEIGHT * heads,
        }

    values, log_steps = {}, LOG_STEPS * (stage.every or TOWER_ROUND)
    while not run.done:
        values |= run.advance(loss)
        if stage.every and run.step % stage.every == 1:
            model.decoder.refresh()
        if run.step % log_steps == 0:
            run.log(stage=name, loss=rounded(values))
        if run.step % (HELD_OUT_ROUNDS * log_steps) == 0:
            run.log(stage=name, held_out=shares(counted(model, 4)), tower=tower_accuracy(model, held_out))
    run.save()
    run.log(stage=name, held_out=shares(counted(model, 12)), tower=tower_accuracy(model, held_out))


def tower_accuracy(model: Model, images: Seen) -> dict[str, float]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return rounded(head_accuracy(model.heads(*features(model.tower, images.pixels)), images.labels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tiny/smol"), metavar="FOLDER")
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    given = parser.parse_args()
    join()
    train(given.out, given.stage, given.minutes)
