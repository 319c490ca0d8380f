"""The same questions by lmms-eval to its own model `vllm` and to this package's on transformers: `make accuracy-vllm`.

vLLM puts no `<s>` before a chat whose template has none, where transformers' processors do; and lmms-eval gives its
vLLM model at least as many new tokens as that was made with, whatever the task says. `chat_template` and NEW_TOKENS
make both ask the same.

Prints a line a task and plan: how often each is right, and which answers differ. Exits with 1 if any does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_DATASETS_OFFLINE"] = "1"

from .harness import checkpoint, served  # isort: skip (sets vLLM's environment)

from lmms_eval import evaluator
from lmms_eval.models import get_model
from vllm.distributed import cleanup_dist_env_and_memory

from vis_sparse.eval.lmms.model import load
from vis_sparse.eval.lmms.run import task_manager

TASKS = ("easy_vqa", "digit_grid")
VARIANTS = {"llava": "", "qwen2_vl": "_framed", "internvl": "_tiled"}  # of the tasks: image sizes that a family knows
NEW_TOKENS = 4  # of the tasks
BATCH = 64
ENGINE = dict(
    dtype="float32", enforce_eager=True, block_size=32, max_model_len=640, max_num_batched_tokens=1024,
    max_num_seqs=16, num_gpu_blocks_override=400,
)  # fmt: skip


def tasks_of(family: str) -> list[str]:
    return [task + VARIANTS[family] for task in TASKS]


def chat_template(folder: Path) -> str:
    """A checkpoint's chat template with the tokenizer's first token before it."""
    return "{{ bos_token }}" + (folder / "chat_template.jinja").read_text()


@contextmanager
def by_vllm(folder: Path, plan: str):
    """lmms-eval's own model, with an engine under `plan`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model = get_model("vllm")(
        str(folder), batch_size=BATCH, chat_template=chat_template(folder), max_new_tokens=NEW_TOKENS,
        additional_config={"vis_sparse": {"plan": plan}}, **ENGINE,
    )  # fmt: skip
    try:
        yield model
    finally:
        model.client.llm_engine.engine_core.shutdown()
        del model.client
        cleanup_dist_env_and_memory()


def said(model, tasks: list[str], questions: int) -> dict[str, list[tuple[str, bool]]]:
    """By task: each answer, and whether it is right."""
    model.clean = lambda: None  # what comes after a run is ours
    results = evaluator.simple_evaluate(
        model=model, tasks=tasks, task_manager=task_manager(tasks), limit=questions, batch_size=BATCH,
        log_samples=True, bootstrap_iters=0,
        cli_args=argparse.Namespace(process_with_media=False, output_path=None, reasoning_tags=None),
    )  # fmt: skip
    return {
        task: [(one["filtered_resps"][0].strip(), bool(one["exact_match"])) for one in sorted(samples, key=_number)]
        for task, samples in results["samples"].items()
    }


def _number(sample: dict) -> int:
    return sample["doc_id"]


def compared(folder: Path, plans: list[str], tasks: list[str], questions: int, on_row=lambda row: None) -> list[dict]:
    """A row a plan and task: per cent of right answers, and (number, by vLLM, by transformers) of those that differ."""
    rows = []
    # lmms-eval's class for Qwen2-VL resizes images to multiples of 28 pixels
    reference = load(str(folder), plan="dense", dtype="float32", device="cpu", base="llava_hf")
    for plan in plans:
        with by_vllm(folder, plan) as model:
            served_answers = said(model, tasks, questions)
        reference.use_plan(plan)
        for task, expected in said(reference, tasks, questions).items():
            pairs = list(zip(served_answers[task], expected, strict=True))
            row = {
                "task": task, "plan": plan, "questions": len(pairs),
                "vllm": 100 * sum(right for (_, right), _ in pairs) / len(pairs),
                "transformers": 100 * sum(right for _, (_, right) in pairs) / len(pairs),
                "differ": [(number, a, b) for number, ((a, _), (b, _)) in enumerate(pairs) if a != b],
            }  # fmt: skip
            rows.append(row)
            on_row(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="llava", choices=list(VARIANTS))
    parser.add_argument("--plan", nargs="+", default=["dense", "vtw", "vica"])
    parser.add_argument("--questions", type=int, default=250)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = served(Path(scratch) / settings.family, checkpoint(settings.family))
        rows = compared(
            folder, settings.plan, tasks_of(settings.family), settings.questions,
            on_row=lambda row: print(json.dumps(row), flush=True),
        )  # fmt: skip
    return int(any(row["differ"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
