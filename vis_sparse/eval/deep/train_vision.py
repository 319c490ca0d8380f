"""Runs the first stage: `python -m vis_sparse.eval.deep.train_vision --out FOLDER`."""

import argparse
from pathlib import Path

import numpy as np
import torch

from vis_sparse.eval.deep.run import Run, Schedule, join, rank, rounded, world
from vis_sparse.eval.deep.vision import Heads, features, head_accuracy, head_losses, new_tower, seen
from vis_sparse.eval.tiny.data import easy_vqa_scenes, grid_scene
from vis_sparse.eval.tiny.reading import WORDS, full_page, page
from vis_sparse.eval.tiny.train import mirrored

SEED = 1
IMAGES = (1, 2, 2, 10)  # easy-VQA, grids, pages, full pages a step and process
SCHEDULE = Schedule(minutes=20, decay=0.5, last=0.1)
RATE = 3e-3
LOG_STEPS = 25


def images(rng: np.random.Generator, numbers: tuple[int, ...], split: str = "train") -> list:
    shapes, grids, pages, full = numbers
    known = easy_vqa_scenes(split)
    chosen = [known[i] for i in rng.integers(len(known), size=shapes)]
    if split == "train":
        chosen = [mirrored(scene, rng) for scene in chosen]
    chosen += [grid_scene(rng, 1, split) for _ in range(grids)]
    chosen += [page(rng, split, WORDS) for _ in range(pages)]
    return chosen + [full_page(rng, WORDS) for _ in range(full)]


def train(folder: Path, minutes: float) -> None:
    torch.manual_seed(SEED)
    tower, heads = new_tower(), Heads()
    named = {f"tower.{name}": p for name, p in tower.named_parameters() if "post_layernorm" not in name}
    named |= {f"heads.{name}": p for name, p in heads.named_parameters()}
    run = Run(folder, Schedule(minutes, decay=SCHEDULE.decay, last=SCHEDULE.last), [(RATE, named)], weight_decay=0.02)
    held_out = seen(images(np.random.default_rng(1), (16, 32, 80, 0), "test"))

    def loss():
        rng = np.random.default_rng([SEED, run.step, rank()])
        data = seen(images(rng, IMAGES))
        with torch.autocast("cpu", torch.bfloat16):
            return head_losses(heads(*features(tower, data.pixels)), data.labels)

    while not run.done:
        values = run.advance(loss)
        if run.step % LOG_STEPS == 0:
            run.log(stage="vision", loss=rounded(values))
        if run.step % (8 * LOG_STEPS) == 0 and rank() == 0:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                run.log(
                    stage="vision",
                    held_out=rounded(head_accuracy(heads(*features(tower, held_out.pixels)), held_out.labels)),
                )
    run.save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=SCHEDULE.minutes)
    given = parser.parse_args()
    join()
    world()
    train(given.out, given.minutes)
