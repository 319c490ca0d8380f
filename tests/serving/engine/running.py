"""Engines for tests, and requests with what they must say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .harness import Reference, farthest, picture, plan_files, text

DEFAULT = "vica"
PLACE = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "internvl": "<IMG_CONTEXT>"}


@contextmanager
def engine(folder: Path, plans: Path | None, processes: bool = False, **settings) -> Iterator:
    """An engine on a checkpoint, with the plans of `plan_files` (None: without the plug-in's settings).

    processes: scheduler and workers in processes of their own, as vLLM has it by itself; else it starts much sooner.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(processes))
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 640,
        "limit_mm_per_prompt": {"image": 3},
        "block_size": 32,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 6,
        "max_logprobs": 70,
        "disable_log_stats": False,
        "num_gpu_blocks_override": 240,
    } | settings
    if plans is not None:
        others = [source for name, source in plan_files(plans).items() if name != DEFAULT]
        settings["additional_config"] = {"vis_sparse": {"plan": DEFAULT, "plans": others}}
    llm = LLM(str(folder), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


@dataclass
class Ask:
    """A request: pictures, words between them, words at the end, and a plan (None: the engine's default)."""

    seed: int
    images: int
    plan: str | None = None
    words: int = 2
    tail: int = 3
    tokens: int = 5
    prompt_logprobs: int | None = None
    place: str = "<image>"
    sizes: tuple[tuple[int, int], ...] = ((96, 96),)

    @property
    def pictures(self) -> list[Image.Image]:
        return [picture(10 * self.seed + i, *self.sizes[i % len(self.sizes)]) for i in range(self.images)]

    @property
    def prompt(self) -> dict:
        parts = [f"{self.place} {text(self.seed + i, self.words)}" for i in range(self.images)]
        words = f"user: {' '.join(parts)} {text(self.seed + 9, self.tail)} assistant:"
        return {"prompt": words} | ({"multi_modal_data": {"image": self.pictures}} if self.images else {})

    @property
    def params(self):
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=self.tokens, temperature=0, logprobs=60, prompt_logprobs=self.prompt_logprobs, ignore_eos=True,
            extra_args={"vis_sparse_plan": self.plan} if self.plan else None,
        )  # fmt: skip


# functions that are sent to the workers


def rows_entered(model) -> tuple[dict, int]:
    """Rows that entered each layer's attention and FFN so far, and rows that were scheduled."""
    forward = model.vis_sparse_forward
    return {part: list(rows) for part, rows in forward.rows_entered.items()}, forward.rows_scheduled


def has_its_own_forward(model) -> bool:
    return model.forward.__func__ is type(model).forward


def read(outputs) -> list:
    """Of each: tokens, and log-probabilities of answer and prompt."""

    def numbers(entries):
        return [each and {str(token): one.logprob for token, one in each.items()} for each in entries]

    return [
        [list(o.outputs[0].token_ids), numbers(o.outputs[0].logprobs), numbers(o.prompt_logprobs or ())]
        for o in outputs
    ]


def answers(llm, asks: list[Ask]) -> list:
    return llm.generate([ask.prompt for ask in asks], [ask.params for ask in asks], use_tqdm=False)


def worst(llm, asks: list[Ask], against: Reference, plans: Path) -> tuple[float, list]:
    """The greatest distance from the reference, and the outputs. All requests are answered, each to its end."""
    outputs, files = answers(llm, asks), plan_files(plans)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [ask.tokens for ask in asks]
    found = [
        farthest(output, ask.pictures, against.plan(ask.plan or DEFAULT, files), against)
        for output, ask in zip(outputs, asks)
    ]
    return max(found), outputs
