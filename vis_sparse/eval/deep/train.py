"""Trains the deep model: `python -m torch.distributed.run --standalone --nproc-per-node 2 -m
vis_sparse.eval.deep.train`.

Stage 1 (`train_vision`) trains the tower alone; then the projector gets its first weights, without the decoder; stage 2
trains low-rank differences of the decoder, projector and tower on dialogs, with the tower's own losses kept.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from vis_sparse.eval.deep import texts, train_vision
from vis_sparse.eval.deep.decoder import Decoder
from vis_sparse.eval.deep.projector import Words, fit, new_projector, polish, projected
from vis_sparse.eval.deep.run import STATE, Run, Schedule, join, rank, rounded, world
from vis_sparse.eval.deep.sequences import NO_LABEL, Sequences, sequences, visual_places
from vis_sparse.eval.deep.vision import Heads, Seen, features, head_losses, new_tower, seen
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
    "whole": Stage(3, {"lora": 1e-3, "projector": 3e-4, "tower": 2e-3}, decay=0.35, after="vision"),
    "reading": Stage(8, {"lora": 3e-4, "projector": 1e-4, "tower": 2e-3}, decay=0.7, after="whole"),
}


class Model(nn.Module):
    """Tower, its heads, projector and decoder, for training."""

    def __init__(self):
        super().__init__()
        self.tokenizer = smollm2.tokenizer()
        state = smollm2.causal_lm().state_dict()
        self.decoder = Decoder(smollm2.config(), state)
        self.tower, self.heads = new_tower(), Heads()
        self.projector = new_projector(128, smollm2.config().hidden_size)
        self.words = Words(state["model.embed_tokens.weight"], self.tokenizer)

    def load(self, state: Path) -> None:
        """Weights of a stage's run; what it did not have stays."""
        with safe_open(state, "pt") as file, torch.no_grad():
            known = set(file.keys())
            for _, group in self.groups(defaultdict(float)):
                for name, parameter in group.items():
                    if f"weight/{name}" in known:
                        parameter.copy_(file.get_tensor(f"weight/{name}"))

    def groups(self, rates: dict[str, float]) -> list[tuple[float, dict]]:
        vision = {f"tower.{name}": p for name, p in self.tower.named_parameters() if "post_layernorm" not in name}
        vision |= {f"heads.{name}": p for name, p in self.heads.named_parameters()}
        return [
            (rates["lora"], {f"lora.{name}": p for name, p in self.decoder.lora.items()}),
            (rates["projector"], {f"projector.{name}": p for name, p in self.projector.named_parameters()}),
            (rates["tower"], vision),
        ]

    def answers(self, data: Sequences, visual: Tensor) -> Tensor:
        """Next-token logits where `data` has a target, (targets, vocabulary); visual: of the first images, (B, 144,
        width)."""
        embedded = self.decoder.embeddings[data.ids].float()
        places = visual_places(data.ids)
        embedded = embedded.masked_scatter(places[..., None], visual.float())
        hidden = self.decoder(embedded, data.positions, data.visible())
        return self.decoder.logits(hidden[data.targets != NO_LABEL])


def tower_losses(model: Model, images: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Visual tokens; how far they are from sums of word embeddings; the sum of the heads' losses."""
    with torch.autocast("cpu", torch.bfloat16):
        found, half = features(model.tower, images.pixels)
        heads = sum(head_losses(model.heads(found, half), images.labels).values())
        visual = projected(model.projector, found)
    return visual, model.words.loss(visual, images.labels), heads


def losses(model: Model, data: Sequences, images: Seen) -> dict[str, Tensor]:
    """images: those that `data` shows, then others."""
    visual, words, heads = tower_losses(model, images)
    logits = model.answers(data, visual[: len(data.images)])
    where = data.targets != NO_LABEL
    each = F.cross_entropy(logits.float(), data.targets[where], reduction="none")
    weights = data.weights[where]
    return {
        "answers": (each * weights).sum() / weights.sum(),
        "words": WORD_WEIGHT * words,
        "heads": HEAD_WEIGHT * heads,
    }


@torch.no_grad()
def held_out(model: Model, number: int, chats) -> dict[str, float]:
    """Share of turns about held-out images whose answer, and its end, are the likeliest next tokens; by kind, and of
    the turns after the first ("later") and those that lean on one before ("leaning")."""
    right, asked = defaultdict(float), defaultdict(float)
    for part in range(number):
        rng = np.random.default_rng([SEED, 10**6, part, rank()])
        data = sequences(model.tokenizer, rng, ("grid", "page", "shape"), chats, split="test")
        with torch.autocast("cpu", torch.bfloat16):
            visual = projected(model.projector, features(model.tower, seen(data.images).pixels)[0])
        where = data.targets != NO_LABEL
        correct = torch.ones_like(where)
        correct[where] = model.answers(data, visual).argmax(dim=-1) == data.targets[where]
        for row, turns in zip(correct, data.turns, strict=True):
            for turn, number_in_dialog, start, end in turns:
                names = [turn.kind, *(["later"] if number_in_dialog else []), *(["leaning"] if turn.leans else [])]
                for name in names:
                    asked[name] += 1
                    right[name] += row[start:end].all().item()
    names = sorted(
        {
            "easy_vqa",
            "place",
            "count",
            "exists",
            "reading",
            "later",
            "leaning",
            "description",
            "which_line",
            "lines",
            "beside",
        }
    )
    counts = torch.tensor([[right[name], asked[name]] for name in names])
    if distributed.is_initialized():
        distributed.all_reduce(counts)
    return {name: (good / all_).item() for name, (good, all_) in zip(names, counts, strict=True) if all_}


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
    model, before = Model(), []
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
        return losses(model, data, seen([*data.images, *train_vision.images(rng, EXTRA_IMAGES)]))

    values = {}
    while not run.done:
        values |= run.advance(loss)
        if run.step % stage.every == 1:
            model.decoder.refresh()
        if run.step % (LOG_STEPS * stage.every) == 0:
            run.log(stage=name, loss=rounded(values))
        if run.step % (HELD_OUT_STEPS * stage.every) == 0:
            run.log(stage=name, held_out=rounded(held_out(model, 4, chats)))
    run.save()
    run.log(stage=name, held_out=rounded(held_out(model, 12, chats)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tiny/smol"), metavar="FOLDER")
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    given = parser.parse_args()
    join()
    train(given.out, given.stage, given.minutes)
