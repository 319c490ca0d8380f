"""Engines on the shipped checkpoints, and what they must say: the transformers executor under the same plan."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",  # tests run side by side
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # rows are counted by a function sent to the workers
)

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vis_sparse
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.plans.plan import VisualPlan

# every kind of layer, and some that an engine does not meet alone: all neurons, some by index, none
MIX = """
name: mix
num_layers: 8
layers:
  0: {attention: full, ffn: 0.25}
  1: {attention: none, ffn: 0.5}
  2: {text_reads: false, attention: none, ffn: [0, 1, 2, 5, 100, 223]}
  3: {attention: full}
  4: off
  5: {attention: none}
  6: {text_reads: false, attention: none, ffn: 0}
  7: {attention: none, ffn: 0}
"""
TOLERANCE = 1e-4


def served(folder: Path, source: Path) -> Path:
    """A folder with the checkpoint's own files. vLLM loads every .safetensors file that lies beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name != "heads.safetensors" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    return folder


def plan_files(folder: Path) -> dict[str, str]:
    """Plans by the name that requests use: what an engine is told."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mix.yaml").write_text(MIX)
    return {"vica": "vica", "vtw": "vtw", "shortv": "shortv", "vskip": "vskip", "mix": str(folder / "mix.yaml")}


def picture(seed: int, height: int = 96, width: int = 96) -> Image.Image:
    """Coloured blocks: not noise, of which a vision tower makes nearly the same wherever it looks."""
    random = np.random.default_rng(seed)
    blocks = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return blocks.resize((width, height), Image.Resampling.NEAREST)


WORDS = "what is the color of the shape ? which digit appear at the top left".split()  # noqa: SIM905


def text(seed: int, words: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, words))


class Reference:
    """Log-probabilities of a family's checkpoint by transformers, patched."""

    def __init__(self, source: Path, dtype=torch.float32):
        self.model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(source)
        self.layers = self.model.config.get_text_config().num_hidden_layers

    def plan(self, name: str, files: dict[str, str]) -> VisualPlan:
        source = files.get(name, name)
        return vis_sparse.load_plan(source).resolve(self.layers)

    @torch.no_grad()
    def logprobs(self, plan: VisualPlan, tokens: list[int], images: list[Image.Image]) -> torch.Tensor:
        """(tokens, vocabulary) of one sequence."""
        call = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}
        if images:
            call |= dict(self.processor.image_processor(images, return_tensors="pt"))
        if "image_grid_thw" in call:
            types = torch.zeros_like(call["input_ids"])
            types[call["input_ids"] == self.model.config.image_token_id] = 1
            call["mm_token_type_ids"] = types
        call.pop("num_patches", None)
        with vis_sparse.patched(self.model, plan):
            return torch.log_softmax(self.model(**call).logits[0].double(), -1)


@cache
def reference(family: str) -> Reference:
    return Reference(checkpoint(family))


def farthest(output, images, plan: VisualPlan, against: Reference, index: int = 0, greedy: bool = True) -> float:
    """How far an engine's log-probabilities are from the reference's, at most: of its answer and, if asked, its prompt.

    index: of the answer. greedy: its tokens must be the reference's own best (or within TOLERANCE of it).
    """
    prompt, answer = list(output.prompt_token_ids), list(output.outputs[index].token_ids)
    expected = against.logprobs(plan, prompt + answer, images)
    found = []
    for position, entries in enumerate(output.outputs[index].logprobs):
        row = expected[len(prompt) - 1 + position]
        found += [abs(entry.logprob - row[token].item()) for token, entry in entries.items()]
        assert not greedy or row[answer[position]] >= row.max() - TOLERANCE, (position, answer[position], row.argmax())
    for position, entries in enumerate(output.prompt_logprobs or ()):
        if entries:
            row = expected[position - 1]
            found += [abs(entry.logprob - row[token].item()) for token, entry in entries.items()]
    assert found
    return max(found)
