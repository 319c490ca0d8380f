"""`bench --engine vllm` without vLLM: turns, ratios, the table, and what it says where vLLM is missing."""

import contextlib
import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vis_sparse.cli.main import app
from vis_sparse.eval import bench_vllm
from vis_sparse.eval.tables import draw_served


@pytest.fixture
def found(monkeypatch):
    calls = []

    @contextlib.contextmanager
    def server(folder, block, dtype, users, log):
        calls.append(("up", block))
        yield lambda: 1 if block is None else 2

    def ask(port, users, requests, text_tokens, new_tokens, image_size, seed):
        calls.append((port, users, requests, seed))
        slow = 1 + seed  # rounds differ; within one the plan takes half
        return {"ttft_ms": 100.0 * slow / port, "tpot_ms": 10.0 * slow**port, "tokens_per_s": 50.0 * port}

    @contextlib.contextmanager
    def client(folder, scratch):
        yield ask

    monkeypatch.setattr(bench_vllm, "find_spec", lambda name: True)
    monkeypatch.setattr(bench_vllm, "_server", server)
    monkeypatch.setattr(bench_vllm, "_client", client)
    turns = []
    results = bench_vllm.bench_vllm(
        "vica",
        Path("here"),
        concurrency=(1, 4),
        requests=3,
        repeats=2,
        on_turn=lambda done, all: turns.append((done, all)),
    )
    return results, calls, turns


def test_turns(found):
    results, calls, turns = found
    assert calls[:2] == [("up", None), ("up", {"plan": "vica"})]
    assert calls[2:8] == [(2, 1, 1, 0), (1, 1, 1, 0), (1, 1, 3, 1), (2, 1, 3, 1), (2, 1, 3, 2), (1, 1, 3, 2)]
    assert calls[8:10] == [(2, 4, 4, 0), (1, 4, 4, 0)] and len(calls) == 14  # at least one request a user
    assert turns[-1] == (12, 12) and [row["concurrency"] for row in results] == [1, 4]
    assert results[0]["ratio_tokens_per_s"] == 2 and results[0]["quartiles_ttft_ms"] == [0.5, 0.5]
    assert results[0]["ratio_tpot_ms"] == 2.5 and results[0]["quartiles_tpot_ms"] == [2.25, 2.75]  # 2 and 3
    assert results[1]["requests"] == 4 and results[0]["repeats"] == 2


def test_the_table(found):
    console = Console(width=80, record=True, file=io.StringIO())
    draw_served(console, found[0])
    text = console.export_text()
    assert "first token" in text and "vica" in text and "2.00" in text and "2.25 to 2.75" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_plan_or_none(found, monkeypatch):
    _, calls, _ = found
    calls.clear()
    bench_vllm.bench_vllm(bench_vllm.UNTOLD, Path("here"), concurrency=(1,), repeats=1)
    assert calls[:2] == [("up", None), ("up", {})]


@pytest.mark.skipif(bench_vllm.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_so():
    done = CliRunner().invoke(app, ["bench", "--engine", "vllm", "--plan", "vica"])
    assert done.exit_code != 0 and "vllm is not installed" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["bench", "--engine", "tgi"])
    assert done.exit_code != 0
