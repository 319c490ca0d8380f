"""Many requests to one engine: `make soak-vllm`. Random images, lengths, plans, aborts and too few blocks, so that some
are preempted. Every answer is compared with the transformers executor's; none may be lost, no block may stay held, and
memory must stay flat.

Prints a line now and then and a summary as JSON; exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil

from vis_sparse.eval.random_checkpoint import random_llava

from .harness import TOLERANCE, Reference, farthest, plan_files
from .running import DEFAULT, Ask, engine

PLANS = (None, "dense", "vtw", "shortv", "vskip", "mix")


def memory() -> int:
    """Bytes that this process and the engine's hold."""
    me = psutil.Process()
    return sum(process.memory_info().rss for process in [me, *me.children(recursive=True)])


def ask_of(rng: random.Random) -> Ask:
    """One of some hundred prompts, so that prefixes repeat."""
    return Ask(
        rng.randrange(12), rng.choice([0, 1, 1, 1, 2, 3]), rng.choice(PLANS), words=rng.randrange(4),
        tail=rng.choice([0, 3, 9]), tokens=rng.choice([1, 5, 20]), prompt_logprobs=rng.choice([None] * 9 + [5]),
    )  # fmt: skip


def soak(requests: int, seed: int, folder: Path, plans: Path, out=print) -> dict:
    rng, against, files = random.Random(seed), Reference(folder), plan_files(plans)
    asked: dict[str, Ask] = {}
    aborted, wrong, worst, sent, done, marks = set(), [], 0.0, 0, 0, []
    with engine(folder, plans, max_model_len=384, num_gpu_blocks_override=64) as llm:
        core, start = llm.llm_engine, time.monotonic()
        while sent < requests or asked:
            while sent < requests and len(asked) < 10:
                name, ask = f"r{sent}", ask_of(rng)
                core.add_request(name, ask.prompt, ask.params)
                asked[name], sent = ask, sent + 1
            for output in core.step():
                name = output.request_id
                if not output.finished or name in aborted:
                    continue
                ask, done = asked.pop(name), done + 1
                plan = against.plan(ask.plan or DEFAULT, files)
                try:
                    assert len(output.outputs[0].token_ids) == ask.tokens
                    distance = farthest(output, ask.pictures, plan, against)
                    worst = max(worst, distance)
                    assert distance < TOLERANCE, distance
                except AssertionError as error:
                    wrong.append({"request": name, "ask": repr(ask), "why": str(error)[:200]})
                    out(f"wrong: {wrong[-1]}")
                if done % 50 == 0:
                    marks.append(memory())
                    out(f"{done} answered, {len(aborted)} aborted, {len(wrong)} wrong, worst {worst:.1e}, "
                        f"{marks[-1] / 2**20:.0f} MiB, {time.monotonic() - start:.0f} s")  # fmt: skip
            if asked and rng.random() < 0.02:
                name = rng.choice(sorted(asked))
                core.abort_request([name])
                aborted.add(name)
                del asked[name]
        metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        pool = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block
    quarter = marks[len(marks) // 4] if marks else 0
    return {
        "requests": sent, "answered": done, "aborted": len(aborted), "lost": sent - done - len(aborted),
        "wrong": wrong, "worst": worst, "preemptions": metrics.get("vllm:num_preemptions"),
        "prefix_hits": metrics.get("vllm:prefix_cache_hits"),
        "blocks_held_after": held,
        "bytes_at_a_quarter": quarter, "bytes_at_the_end": marks[-1] if marks else 0,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_llava(Path(scratch) / "llama")
        found = soak(
            settings.requests, settings.seed, folder, Path(scratch) / "plans", lambda line: print(line, flush=True)
        )
    print(json.dumps(found, indent=1))
    grown = found["bytes_at_the_end"] - found["bytes_at_a_quarter"]
    return int(bool(found["wrong"] or found["lost"] or found["blocks_held_after"] or grown > 64 * 2**20))


if __name__ == "__main__":
    sys.exit(main())
