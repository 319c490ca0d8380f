"""Trains a small model: `python -m vis_sparse.eval.tiny.train --family llava --out FOLDER`.

Stage 1 trains the vision tower and the projector until visual tokens are bags of the language model's words; stage 2
trains everything on questions, a dozen about one image in a sequence. The LLaVA starts from nothing; the others start
with the shipped LLaVA's language model (the InternVL with most of its tower too), and their towers learn in stage 1 to
give that LLaVA's visual tokens.
FOLDER gets `state.safetensors` (rewritten every minute; a run that was stopped goes on from it), `training_log.jsonl`
and, at the end, the checkpoint, in a folder named like the family.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import transformers
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor

from vis_sparse.eval.tiny import blocks
from vis_sparse.eval.tiny.data import KINDS, Scene, easy_vqa_scenes, framed, grid_scene, questions
from vis_sparse.eval.tiny.families import FAMILIES, family_of
from vis_sparse.eval.tiny.score import score
from vis_sparse.eval.tiny.warm_start import llava_tokens

SEED = 0
WARMUP_STEPS = 200
WORD_LOSS_WEIGHT = 0.5
SAVE_SECONDS = 60
LOG_STEPS, HELD_OUT_STEPS = 50, 200
TEST_QUESTIONS = 2000


@dataclass(frozen=True)
class Stage:
    """images: (easy-VQA, grids) in a batch. decay: the share of the steps, at the end, over which the rate falls to
    `last` of its peak. frozen: parts of the model that keep their weights."""

    steps: int
    rate: float
    images: tuple[int, int]
    decay: float
    last: float
    frozen: tuple[str, ...] = ()


RECIPES = {
    "llava": (Stage(6000, 1.5e-3, (10, 14), 0.25, 0.1), Stage(4400, 1e-3, (6, 10), 0.25, 0.0)),
    "qwen2_vl": (
        Stage(2000, 1.5e-3, (4, 8), 0.5, 0.1, frozen=("model.language_model",)),
        Stage(600, 7e-4, (4, 8), 0.6, 0.0),
    ),
    "internvl": (
        Stage(1200, 1e-3, (4, 8), 0.5, 0.1, frozen=("model.language_model",)),
        Stage(600, 5e-4, (4, 8), 0.6, 0.0),
    ),
}


def train(name: str, folder: Path) -> None:
    run = Run(name, folder)
    model, total = run.model, sum(stage.steps for stage in run.recipe)
    if hasattr(model.model, "vision_tower"):
        model.model.vision_tower.set_attn_implementation("eager")  # faster than SDPA here, once compiled
    model.model.language_model.set_attn_implementation(blocks.ATTENTION)
    # For each size of image, one graph of the tower and one that all decoder layers share.
    visual_tokens = torch.compile(run.family.visual_tokens, dynamic=False)
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)
    held_out = held_out_scenes(run.family)
    with Progress() as progress:
        bar = progress.add_task("training", total=total, completed=run.step)
        while run.step < total:
            number, _ = stage_at(run.recipe, run.step)
            loss = run.advance((vision_loss, whole_loss)[number], visual_tokens)
            progress.advance(bar)
            if run.step % LOG_STEPS == 0:
                progress.update(bar, description=f"training, stage {number + 1}, loss {loss.sum():.3f}")
                run.log(stage=number + 1, loss=[round(value, 4) for value in loss.tolist()])
            if number == 1 and run.step % HELD_OUT_STEPS == 0:
                with torch.autocast("cpu", torch.bfloat16):
                    run.log(stage=2, held_out=rounded(blocks.accuracy(model, held_out)))
            run.save_now_and_then()
    run.save()
    finish(run)


def vision_loss(model, visual: Tensor, data: blocks.Batch) -> Tensor:
    """The word losses and, if there is a teacher, the share of its visual tokens' energy that is missed."""
    losses = blocks.word_losses(model, visual, data)
    if data.taught is None:
        return losses
    missed = F.mse_loss(visual.float(), data.taught) / data.taught.square().mean()
    return torch.cat([losses, missed[None]])


def whole_loss(model, visual: Tensor, data: blocks.Batch) -> Tensor:
    positions = blocks.block_positions(family_of(model), data.grid)
    logits = blocks.answer_logits(model, visual, data.tokens, None, positions)
    words = WORD_LOSS_WEIGHT * blocks.word_losses(model, visual, data)
    return torch.cat([words, blocks.answer_loss(logits, data.targets)[None]])


def stage_at(recipe: Sequence[Stage], step: int) -> tuple[int, int]:
    """Which stage a step belongs to, 0 or 1, and its number in the stage."""
    first = recipe[0].steps
    return (0, step) if step < first else (1, step - first)


def learning_rate(recipe: Sequence[Stage], step: int) -> float:
    """Warm-up, a plateau, and at the end of a stage a line down."""
    number, at = stage_at(recipe, step)
    stage = recipe[number]
    down = max(0.0, (at / stage.steps - 1 + stage.decay) / stage.decay)
    return stage.rate * min(1.0, (at + 1) / WARMUP_STEPS) * (1 - (1 - stage.last) * down)


def training_scenes(images: tuple[int, int], step: int) -> list[Scene]:
    """The images of one step, (easy-VQA, grids) of them, the same in every run."""
    rng = np.random.default_rng([SEED, step])
    shapes, grids = images
    known = easy_vqa_scenes("train")
    chosen = [mirrored(known[i], rng) for i in rng.integers(len(known), size=shapes)]
    return chosen + [grid_scene(rng, blocks.QUESTIONS) for _ in range(grids)]


def training_batch(family: ModuleType, recipe: Sequence[Stage], step: int) -> blocks.Batch:
    """`training_scenes` at the step's image size, in stage 1 with the teacher's visual tokens if there is a teacher."""
    number, _ = stage_at(recipe, step)
    scenes = training_scenes(recipe[number].images, step)
    if not family.SIZES:
        return blocks.batch(scenes, family)
    data = blocks.batch(framed(scenes, [family.SIZES[step % len(family.SIZES)]]), family)
    if number == 1:
        return data
    width = family.config().text_config.hidden_size
    return replace(data, taught=llava_tokens([scene.image for scene in scenes], family.places(data.grid), width))


def mirrored(scene: Scene, rng: np.random.Generator) -> Scene:
    """An easy-VQA image, in half of the cases left-right reversed, with at most `blocks.QUESTIONS` of its questions."""
    image = scene.image.transpose(0) if rng.random() < 0.5 else scene.image
    asked = [scene.questions[i] for i in rng.permutation(len(scene.questions))[: blocks.QUESTIONS]]
    return Scene(image, tuple(asked), shape=scene.shape, color=scene.color)


def held_out_scenes(family: ModuleType) -> list[Scene]:
    """What the log's accuracies during training are measured on: 64 test images and 64 grids of test digits."""
    rng = np.random.default_rng(1)
    shapes = [Scene(scene.image, scene.questions[: blocks.QUESTIONS]) for scene in easy_vqa_scenes("test")[:64]]
    return framed(shapes + [grid_scene(rng, blocks.QUESTIONS, "test") for _ in range(64)], family.SIZES)


class Run:
    """Model, optimiser, step and log of a training, kept in a folder so that it can be killed at any time."""

    def __init__(self, name: str, folder: Path):
        self.family, self.recipe = FAMILIES[name], RECIPES[name]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.step, self.seconds = folder, 0, 0.0
        self.resumed = self.saved = time.monotonic()
        self.model = self.family.new_model(SEED)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True
        )
        self.log_file = folder / "training_log.jsonl"
        if (folder / "state.safetensors").exists():
            self._load()
        else:
            self.log_file.write_text("")
        self.log(machine=machine())

    @property
    def _trained(self) -> str:
        """What must be equal for a training to go on."""
        return f"{self.family.NAME}, {self.recipe}"

    def advance(self, loss_function: Callable, visual_tokens: Callable) -> Tensor:
        """One step; returns the summands of the loss."""
        number, _ = stage_at(self.recipe, self.step)
        self.model.requires_grad_(True)
        for part in self.recipe[number].frozen:
            self.model.get_submodule(part).requires_grad_(False)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        data = training_batch(self.family, self.recipe, self.step)
        with torch.autocast("cpu", torch.bfloat16):
            visual = visual_tokens(self.model, data.pixels, data.grid)
            loss = loss_function(self.model, visual, data)
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def save_now_and_then(self) -> None:
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"weight/{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        new = self.folder / "state.new"
        facts = {"step": str(self.step), "seconds": str(self._seconds()), "trained": self._trained}
        save_file(tensors, new, metadata=facts)
        os.replace(new, self.folder / "state.safetensors")
        self.saved = time.monotonic()

    def _load(self) -> None:
        file = self.folder / "state.safetensors"
        with safe_open(file, "pt") as state, torch.no_grad():
            if state.metadata().get("trained") != self._trained:
                raise ValueError(
                    f"{file} is of another model or recipe than {self._trained}, expected the same (remove the folder "
                    "to start again)"
                )
            self.step, self.seconds = int(state.metadata()["step"]), float(state.metadata()["seconds"])
            stored = set(state.keys())
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state.get_tensor(f"weight/{name}"))
                moments = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in stored]
                if moments:
                    self.optimizer.state[parameter] = {key: state.get_tensor(f"{key}/{name}") for key in moments}
        records = [json.loads(line) for line in self.log_file.read_text().splitlines() if line.endswith("}")]
        kept = [json.dumps(record) + "\n" for record in records if record["step"] <= self.step]
        new = self.folder / "log.new"
        new.write_text("".join(kept))
        os.replace(new, self.log_file)

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.resumed

    def log(self, **facts) -> None:
        with self.log_file.open("a") as file:
            file.write(json.dumps({"step": self.step, "seconds": round(self._seconds(), 1), **facts}) + "\n")


def machine() -> dict[str, str | int]:
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def finish(run: Run) -> None:
    """Write the checkpoint, and log the scores of what was written."""
    family = run.family
    folder = run.folder / family.NAME
    family.save(run.model, folder)
    model = family.MODEL.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with Progress() as progress:
        for kind in progress.track(KINDS, description="scoring"):
            asked = questions(kind, TEST_QUESTIONS, sizes=family.SIZES)
            accuracy = score(model, processor, asked)
            blind = blocks.accuracy(model, [Scene(question.image, (question,)) for question in asked], blind=True)
            run.log(kind=kind, questions=len(asked), accuracy=rounded(accuracy)[kind], blind=rounded(blind)[kind])


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=RECIPES, default="llava")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: out/tiny/FAMILY")
    given = parser.parse_args()
    train(given.family, given.out or Path("out/tiny") / given.family)
