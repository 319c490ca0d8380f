"""Trains the deep model after its first stage: `python -m torch.distributed.run --standalone --nproc-per-node 2 -m
vis_sparse.eval.deep.train --stage whole --minutes 65 --out FOLDER`.

`train_vision` has trained the tower alone. Stage `whole` gives the projector its first weights, without the decoder,
and trains low-rank differences of the decoder, projector and tower on dialogs, with the tower's own losses kept; stage
`again`, which the shipped model has not had, does so once more on top of a finished run.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vis_sparse.eval.deep import texts, train_vision
from vis_sparse.eval.deep.decoder import Decoder
from vis_sparse.eval.deep.model import Model, answer_loss, tower_losses
from vis_sparse.eval.deep.projector import fit, polish
from vis_sparse.eval.deep.run import STATE, Run, Schedule, join, rank, rounded, world
from vis_sparse.eval.deep.scoring import counted, shares
from vis_sparse.eval.deep.sequences import sequences
from vis_sparse.eval.deep.vision import features, seen
from vis_sparse.eval.tiny import smollm2

SEED = 2
# What a process's sequences show; processes take them in turn.
MIXES = (("grid", "page", "grid"), ("page", "shape", "page"), ("page", "grid", "chat"), ("grid", "page", "shape"))
# For the tower's own losses: easy-VQA, grids, pages, full pages, in a step of the whole model and in one of the tower.
EXTRA_IMAGES, TOWER_IMAGES = (0, 2, 1, 4), (1, 4, 2, 8)
HEAD_WEIGHT, WORD_WEIGHT, WORD_WEIGHT_ALONE = 0.5, 0.1, 1.0
FIT_BATCHES, POLISH_STEPS = 24, 150
LOG_STEPS, HELD_OUT_STEPS = 5, 40  # of the whole model


@dataclass(frozen=True)
class Stage:
    """every: one of so many steps trains the whole model, and the others the tower and the projector alone, since
    reading comes last. rates: of the parts. after: the stage whose weights it begins with."""

    every: int
    rates: dict[str, float]
    decay: float
    after: str


STAGES = {
    "whole": Stage(3, {"lora": 1e-3, "projector": 3e-4, "tower": 2e-3}, decay=0.5, after="vision"),
    "again": Stage(3, {"lora": 7e-4, "projector": 2e-4, "tower": 2e-3}, decay=0.8, after="whole"),
}


def first_projector(model: Model) -> list[float]:
    """Give the projector its first weights, for the tower as it is; its losses meanwhile."""
    parts = []
    for number in range(FIT_BATCHES):
        shown = seen(train_vision.images(np.random.default_rng([SEED, number]), (2, 8, 14, 4)))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts.append((features(model.tower, shown.pixels)[0].float(), shown))
    wanted = [model.words.targets(shown.labels) for _, shown in parts]
    kept = [(found[known], target[known]) for (found, _), (target, known) in zip(parts, wanted, strict=True)]
    fit(model.projector, *(torch.cat(column) for column in zip(*kept, strict=True)))
    return list(polish(model.projector, model.words, parts, POLISH_STEPS))


def train(folder: Path, name: str, minutes: float) -> None:
    stage, chats = STAGES[name], texts.answered(folder / "texts.json")
    model, before = Model(lambda state: Decoder(smollm2.config(), state)), []
    if not (folder / name / STATE).exists():
        model.load(folder / stage.after / STATE)
        if stage.after == "vision":
            before = first_projector(model)
    run = Run(folder / name, Schedule(minutes, decay=stage.decay), model.groups(stage.rates))
    if before:
        run.log(stage="projector", loss=rounded({"first": before[0], "last": before[-1]}))
    model.decoder.refresh()
    model.decoder.compile_pointwise()

    def loss():
        rng = np.random.default_rng([SEED, run.step, rank()])
        if run.step % stage.every:
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

    values = {}
    while not run.done:
        values |= run.advance(loss)
        if run.step % stage.every == 1:
            model.decoder.refresh()
        if run.step % (LOG_STEPS * stage.every) == 0:
            run.log(stage=name, loss=rounded(values))
        if run.step % (HELD_OUT_STEPS * stage.every) == 0:
            run.log(stage=name, held_out=shares(counted(model, 4)))
    run.save()
    run.log(stage=name, held_out=shares(counted(model, 12)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tiny/smol"), metavar="FOLDER")
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    given = parser.parse_args()
    join()
    train(given.out, given.stage, given.minutes)
