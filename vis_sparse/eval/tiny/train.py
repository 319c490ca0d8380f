"""Trains the small LLaVA from nothing: `python -m vis_sparse.eval.tiny.train --out FOLDER`.

Stage 1 trains the vision tower and the projector until visual tokens are bags of the language model's words; stage 2
trains everything on questions, a dozen about one image in a sequence. FOLDER gets `state.safetensors` (rewritten every
minute; a run that was stopped goes on from it), `training_log.jsonl` and, at the end, the checkpoint `llava`.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vis_sparse.eval.tiny import blocks
from vis_sparse.eval.tiny.data import KINDS, Scene, easy_vqa_scenes, grid_scene, questions
from vis_sparse.eval.tiny.model import new_model, save
from vis_sparse.eval.tiny.score import score

SEED = 0
VISION_STEPS, VISION_LR, VISION_IMAGES = 6000, 1.5e-3, (10, 14)  # (easy-VQA, grids) in a batch
WHOLE_STEPS, WHOLE_LR, WHOLE_IMAGES = 4400, 1e-3, (6, 10)
WARMUP_STEPS = 200
DECAY_SHARE = 0.25
WORD_LOSS_WEIGHT = 0.5
SAVE_SECONDS = 60
LOG_STEPS, HELD_OUT_STEPS = 50, 400
TEST_QUESTIONS = 2000


def train(folder: Path) -> None:
    run = Run(folder)
    model = run.model
    model.model.vision_tower.set_attn_implementation("eager")  # faster than SDPA here, once compiled
    model.model.language_model.set_attn_implementation(blocks.ATTENTION)
    losses = {1: torch.compile(vision_loss), 2: torch.compile(whole_loss)}
    held_out = held_out_scenes()
    with Progress() as progress:
        bar = progress.add_task("training", total=VISION_STEPS + WHOLE_STEPS, completed=run.step)
        while run.step < VISION_STEPS + WHOLE_STEPS:
            stage = 1 if run.step < VISION_STEPS else 2
            loss = run.advance(losses[stage], training_scenes(run.step), learning_rate(run.step))
            progress.advance(bar)
            if run.step % LOG_STEPS == 0:
                progress.update(bar, description=f"training, stage {stage}, loss {loss.sum():.3f}")
                run.log(stage=stage, loss=[round(value, 4) for value in loss.tolist()])
            if stage == 2 and run.step % HELD_OUT_STEPS == 0:
                with torch.autocast("cpu", torch.bfloat16):
                    run.log(stage=stage, held_out=rounded(blocks.accuracy(model, held_out)))
            run.save_now_and_then()
    run.save()
    finish(run)


def vision_loss(model, data: blocks.Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return blocks.word_losses(model, blocks.visual_tokens(model, data.pixels), data)


def whole_loss(model, data: blocks.Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        visual = blocks.visual_tokens(model, data.pixels)
        logits = blocks.answer_logits(model, visual, data.tokens, None, blocks.block_positions())
        words = WORD_LOSS_WEIGHT * blocks.word_losses(model, visual, data)
        return torch.cat([words, blocks.answer_loss(logits, data.targets)[None]])


def learning_rate(step: int) -> float:
    """Warm-up, a plateau, and in the last quarter of a stage a line down to a tenth (stage 1) or nothing (stage 2)."""
    steps, peak, last = (VISION_STEPS, VISION_LR, 0.1) if step < VISION_STEPS else (WHOLE_STEPS, WHOLE_LR, 0.0)
    at = step if step < VISION_STEPS else step - VISION_STEPS
    down = max(0.0, (at / steps - 1 + DECAY_SHARE) / DECAY_SHARE)
    return peak * min(1.0, (at + 1) / WARMUP_STEPS) * (1 - (1 - last) * down)


def training_scenes(step: int) -> list[Scene]:
    """The images of one step, the same in every run."""
    rng = np.random.default_rng([SEED, step])
    shapes, grids = VISION_IMAGES if step < VISION_STEPS else WHOLE_IMAGES
    known = easy_vqa_scenes("train")
    chosen = [mirrored(known[i], rng) for i in rng.integers(len(known), size=shapes)]
    return chosen + [grid_scene(rng, blocks.QUESTIONS) for _ in range(grids)]


def mirrored(scene: Scene, rng: np.random.Generator) -> Scene:
    """An easy-VQA image, in half of the cases left-right reversed, with at most `blocks.QUESTIONS` of its questions."""
    image = scene.image.transpose(0) if rng.random() < 0.5 else scene.image
    asked = [scene.questions[i] for i in rng.permutation(len(scene.questions))[: blocks.QUESTIONS]]
    return Scene(image, tuple(asked), shape=scene.shape, color=scene.color)


def held_out_scenes() -> list[Scene]:
    """What the log's accuracies during training are measured on: 64 test images and 64 grids of test digits."""
    rng = np.random.default_rng(1)
    shapes = [Scene(scene.image, scene.questions[: blocks.QUESTIONS]) for scene in easy_vqa_scenes("test")[:64]]
    return shapes + [grid_scene(rng, blocks.QUESTIONS, "test") for _ in range(64)]


class Run:
    """Model, optimiser, step and log of a training, kept in a folder so that it can be killed at any time."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.step, self.seconds = folder, 0, 0.0
        self.resumed = self.saved = time.monotonic()
        self.model = new_model(SEED)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True
        )
        self.log_file = folder / "training_log.jsonl"
        if (folder / "state.safetensors").exists():
            self._load()
        else:
            self.log_file.write_text("")
        self.log(machine=machine())

    def advance(self, loss_function: Callable, scenes: list[Scene], learning_rate: float) -> Tensor:
        """One step; returns the summands of the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = loss_function(self.model, blocks.batch(scenes))
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
        facts = {"step": str(self.step), "seconds": str(self._seconds())}
        save_file(tensors, new, metadata=facts)
        os.replace(new, self.folder / "state.safetensors")
        self.saved = time.monotonic()

    def _load(self) -> None:
        with safe_open(self.folder / "state.safetensors", "pt") as state, torch.no_grad():
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
    folder = run.folder / "llava"
    save(run.model, folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with Progress() as progress:
        for kind in progress.track(KINDS, description="scoring"):
            asked = questions(kind, TEST_QUESTIONS)
            accuracy = score(model, processor, asked)
            blind = blocks.accuracy(model, [Scene(question.image, (question,)) for question in asked], blind=True)
            run.log(kind=kind, questions=len(asked), accuracy=rounded(accuracy)[kind], blind=rounded(blind)[kind])


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tiny"), metavar="FOLDER")
    train(parser.parse_args().out)
