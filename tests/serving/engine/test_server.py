"""The OpenAI-compatible server, compiled: chat with images, streams, a plan by request, errors, aborts, metrics."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from vis_sparse.eval.random_checkpoint import random_llava
from vis_sparse.eval.tiny.words import BOS, IMAGE
from vis_sparse.serving.step import merged_segments
from vis_sparse.serving.tables import empty_columns

from .harness import TOLERANCE, Reference, picture, plan_files, text
from .running import DEFAULT


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("served") / "llama")


@pytest.fixture(scope="module")
def against(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def server(folder, plans, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = [source for name, source in plan_files(plans).items() if name != DEFAULT]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--port", str(port), "--host", "127.0.0.1",
        "--dtype", "float32", "--max-model-len", "640", "--block-size", "32", "--max-num-batched-tokens", "64",
        "--max-num-seqs", "6", "--max-logprobs", "70", "--num-gpu-blocks-override", "104",
        "--served-model-name", "tiny", "--limit-mm-per-prompt", '{"image": 3}',
        "--additional-config", json.dumps({"vis_sparse": {"plan": DEFAULT, "plans": others}}),
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ)
    try:
        end = time.time() + 3600  # on a machine that has much else to do
        while True:
            assert process.poll() is None and time.time() < end, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield port, log
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # still starting
            process.kill()


def body(seed: int, images: int, plan: str | None, **more) -> dict:
    parts = []
    for index in range(images):
        file = io.BytesIO()
        picture(10 * seed + index).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": text(seed, 6)})
    asked = {"vllm_xargs": {"vis_sparse_plan": plan}} if plan else {}
    return {
        "model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 5, "temperature": 0,
        "logprobs": True, "top_logprobs": 20, "ignore_eos": True, "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    } | asked | more  # fmt: skip


def post(port: int, call: dict):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(call).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=600)


def farthest(against, plans, plan, images, prompt, entries) -> float:
    """entries: (token, {token: log-probability}) of each token of the answer."""
    answer = [token for token, _ in entries]
    resolved = against.plan(plan or DEFAULT, plan_files(plans))
    expected = against.logprobs(resolved, prompt + answer, images)
    found = []
    for position, (token, top) in enumerate(entries):
        row = expected[len(prompt) - 1 + position]
        assert row[token] >= row.max() - TOLERANCE
        found += [abs(value - row[key].item()) for key, value in top.items()]
    return max(found)


def read(content) -> list:
    def number(name):
        return int(name.removeprefix("token_id:"))

    return [
        (number(each["token"]), {number(one["token"]): one["logprob"] for one in each["top_logprobs"]})
        for each in content
    ]


def test_chat(server, against, plans):
    """Several at once, each with its plan."""
    port, _ = server
    asks = [(i, i % 3, plan) for i, plan in enumerate([None, "dense", "mix", "vtw", None, "shortv", "vica", "mix"])]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda ask: json.load(post(port, body(*ask))), asks))
    for (seed, images, plan), reply in zip(asks, replies):
        entries = read(reply["choices"][0]["logprobs"]["content"])
        pictures = [picture(10 * seed + index) for index in range(images)]
        assert farthest(against, plans, plan, pictures, reply["prompt_token_ids"], entries) < TOLERANCE


def test_stream(server, against, plans):
    port, _ = server
    events = [
        json.loads(line[6:]) for line in post(port, body(3, 1, "mix", stream=True)) if line.startswith(b"data: {")
    ]
    chosen = [event["choices"][0] for event in events if event["choices"]]
    entries = [entry for each in chosen if each.get("logprobs") for entry in read(each["logprobs"]["content"])]
    prompt = next(event["prompt_token_ids"] for event in events if event.get("prompt_token_ids"))
    assert len(chosen) > 3 and len(entries) == 5
    assert farthest(against, plans, "mix", [picture(30)], prompt, entries) < TOLERANCE


def test_a_chat_begins_with_bos_if_it_is_asked_for(server):
    """docs/serving.md: vLLM's chats leave out what the tokenizer puts before a text; the request may ask for it."""
    port, _ = server
    chat, asked = (json.load(post(port, body(3, 0, None, **more))) for more in ({}, {"add_special_tokens": True}))
    assert asked["prompt_token_ids"] == [BOS, *chat["prompt_token_ids"]] and chat["prompt_token_ids"][0] != BOS


def test_an_unknown_plan_is_the_clients_error(server):
    port, _ = server
    with pytest.raises(urllib.error.HTTPError) as error:
        post(port, body(3, 1, "yopo-12"))
    assert error.value.code == 400
    assert "got 'yopo-12', expected one of the plans that the engine loaded: vica" in error.value.read().decode()


def test_aborts_leave_nothing(server, against, plans):
    """Clients that go away in the middle; then all blocks are free again, and the next answers are right."""
    port, _ = server
    for index in range(6):
        stream = post(port, body(index, 1 + index % 2, ["mix", None, "dense"][index % 3], stream=True, max_tokens=300))
        stream.readline()
        stream.close()
    end = time.time() + 120
    while metric(port, "vllm:num_requests_running") or metric(port, "vllm:num_requests_waiting"):
        assert time.time() < end
        time.sleep(0.5)
    assert metric(port, "vllm:kv_cache_usage_perc") == 0
    test_stream(server, against, plans)


def test_metrics_and_log(server):
    port, log = server
    before = metric(port, "vis_sparse:visual_tokens_total", "mix")
    json.load(post(port, body(8, 2, "mix")))
    assert metric(port, "vis_sparse:visual_tokens_total", "mix") - before == 128
    tokens = metric(port, "vis_sparse:visual_tokens_total", DEFAULT)
    assert tokens and metric(port, "vis_sparse:attention_rows_not_dispatched_total", DEFAULT) == 8 * tokens
    assert metric(port, "vis_sparse:keys_not_written_total", DEFAULT) == 6 * tokens
    log = log.read_text()
    assert "plan 'vica' leaves out, of each visual token, 8 of 8 attention rows, 8.0 of 8 FFN rows" in log
    assert "; of a prompt of one image (64 visual tokens) and 64 text tokens it computes" in log
    before = metric(port, "vis_sparse:kv_blocks_not_held_total", DEFAULT)
    prompt = json.load(post(port, body(8, 2, DEFAULT)))["prompt_token_ids"]
    images = merged_segments((i, i) for i, token in enumerate(prompt) if token == IMAGE)
    empty = len(empty_columns(images, 32))
    assert empty and metric(port, "vis_sparse:kv_blocks_not_held_total", DEFAULT) - before == 6 * empty
    assert not metric(port, "vis_sparse:kv_blocks_not_held_total", "dense")


def metric(port: int, name: str, plan: str | None = None) -> float:
    found = 0.0
    for line in urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode().splitlines():
        if line.startswith(f"{name}{{") and (plan is None or f'plan="{plan}"' in line):
            found += float(line.rsplit(" ", 1)[1])
    return found
