"""`vis-sparse report`: every row it is given stands on the page, and pictures are where the numbers are."""

import html
import json
import re
import xml.etree.ElementTree as ET

import pytest
import typer
from typer.testing import CliRunner

from vis_sparse.cli.report import read_results, report_command
from vis_sparse.eval.charts import heat_map, scatter, strip, ticks

FACTS = {
    "machine": {"cpu": "A <fast> one", "threads": 2, "device": "cpu"},
    "versions": {"torch": "2", "transformers": "5"},
    "date": "2026-01-02T03:04:05",
}


def left(shares, **changes):
    """What a plan leaves of a prompt, layer by layer."""
    strip = {"about": "", "visual_tokens": 144, "text_tokens": 11, "share": sum(shares) / len(shares), "shares": shares}
    return strip | {"reads": [True] * len(shares)} | changes


def eval_row(task, plan, value, gflops, **changes):
    row = {
        "model": "a & b", "task": task, "plan": plan, "metric": "exact_match", "value": value, "stderr": 0.01,
        "higher_is_better": True, "samples": 10, "same_as_dense": 0.5, "failed": {}, "gflops": gflops,
        "gflops_dense": 4.0, "kv_mib": 1.0, "kv_mib_dense": 2.0, "latency_ms": 7.0, "speedup": 1.25,
        "strip": left([1.0, 0.5]), **FACTS,
    }  # fmt: skip
    return row | changes


BENCH = {
    "model": "llava-1.5-7b", "plan": "yopo-12", "layers": 8, "tower_layers": 6, "batch": 1, "dtype": "float32",
    "compiler": None, "decoder_dense_s": 3.6, "decoder_patched_s": 0.7, "decoder_speedup": 5.1,
    "visual_tokens": 576, "text_tokens": 64, "dense_s": 4.0, "dense_plan_s": 3.0, "patched_s": 1.0,
    "spread": {"dense_s": [3.9, 4.2], "patched_s": [0.9, 1.1]}, "speedup": 4.0, "flop_ratio": 4.24,
    "efficiency": 0.943, "efficiency_vs_dense_plan": 0.707, "kv_bytes": 2**20, "kv_bytes_dense": 3 * 2**20,
    "peak_bytes": 5 * 2**20, "peak_bytes_dense": 9 * 2**20, "strip": left([0.25] * 8), **FACTS,
}  # fmt: skip
PEERS = [
    {"peer": "unpatched", "s": 2.0, "spread": [1.9, 2.2], "speedup": 1.0, "peak_bytes": 2**21},
    {"peer": "other", "why": "ModuleNotFoundError: no <module>"},
]
PEERS = [
    {"model": "Qwen2.5-VL", "layers": 2, "dtype": "float32", "visual_tokens": 24, "text_tokens": 3, "new_tokens": 8}
    | FACTS | row
    for row in PEERS
]  # fmt: skip


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(report_command)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def write(folder, name, data):
    file = folder / name
    file.write_text(json.dumps(data))
    return file


def test_page_has_every_row(command, tmp_path):
    rows = [eval_row("t", "dense", 0.9, 4.0, speedup=None), eval_row("t", "vtw", 0.8, 2.0, failed={"3": "corrupt"})]
    files = [write(tmp_path, "e.json", rows), write(tmp_path, "b.json", BENCH), write(tmp_path, "p.json", PEERS)]
    done = command(*files, "--out", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"(?:src|href)=\"http", page)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for expected in (
        "a & b", "A <fast> one", "0.9 ± 0.01", "0.8 ± 0.01", "1.25×", "4.24", "0.94 / 0.71", "no <module>",
    ):  # fmt: skip
        assert expected in text, expected
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(picture)
    assert page.count('class="strip"') == 3, "plans of the rows: dense, vtw, yopo-12"
    assert "a & b: what the plans compute in its 2 layers" in text
    assert "llava-1.5-7b: what the plans compute in its 8 layers" in text
    assert page.count('class="chart"') == 1


def test_every_evaluated_plan_is_drawn_once(command, tmp_path):
    own = {"strip": left([0.5, 0.0], about="Found by search.", reads=[True, False])}
    rows = [eval_row(task, plan, 0.9, 4.0, **row) for task in "tu" for plan, row in (("dense", {}), ("searched", own))]
    other = eval_row("t", "searched", 0.9, 4.0, strip=left([0.125, 0.125], about="Found again."))
    before = eval_row("t", "vtw", 0.9, 4.0)
    del before["strip"]
    done = command(write(tmp_path, "e.json", [*rows, other, before]), "--out", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "r.html").read_text()
    named = re.findall(r"<dt>(.*?)</dt>.*?layer: ([^\"]*)\".*?<span>(.*?)</span>", page)
    prompt = "of the visual FLOPs of 144 visual and 11 text tokens."
    assert named == [
        ("dense", "100%, 50%", f"75.0% {prompt} "),
        ("searched", "50%, 0%", f"25.0% {prompt} Found by search."),
        ("searched", "12%, 12%", f"12.5% {prompt} Found again."),
    ]


def test_files_that_hold_no_results_are_refused(command, tmp_path):
    (tmp_path / "no.json").write_text("{")
    for file in (tmp_path / "no.json", tmp_path / "absent.json", write(tmp_path, "other.json", [{"plan": "x"}])):
        done = command(file, "--out", tmp_path / "r.html")
        assert done.exit_code == 2 and "expected" in done.output
    assert not (tmp_path / "r.html").exists()


def test_kinds_of_rows(tmp_path):
    kinds = read_results([write(tmp_path, "b.json", [BENCH, BENCH]), write(tmp_path, "p.json", PEERS)])
    assert {kind: len(rows) for kind, rows in kinds.items()} == {"eval": 0, "peers": 2, "bench": 2}


@pytest.mark.parametrize("low, high", [(0, 1), (0.995, 1.005), (0, 4.0), (-3, 12), (61.2, 100), (0, 1e-3)])
def test_ticks_lie_within_and_are_few(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * high <= tick <= high + 1e-9 * high for tick in found)
    assert len({round(b - a, 9) for a, b in zip(found, found[1:])}) == 1


def test_scatter_places_points_by_value():
    picture = ET.fromstring(scatter([("a", 100, 0.9, 0), ("b", 50, 0.9, 0), ("c", 50, 0.5, 0)], ["a"], "x", "y"))
    at = {}
    for circle, name in zip(picture.findall("circle"), ("a", "b", "c")):
        at[name] = float(circle.get("cx")), float(circle.get("cy"))
    assert at["b"][0] == at["c"][0] < at["a"][0]
    assert at["a"][1] == at["b"][1] < at["c"][1]
    heights = [float(label.get("y")) for label in picture.findall("text")[-3:]]
    assert len(set(heights)) >= 2


def test_no_score_above_the_highest_is_on_the_axis():
    picture = ET.fromstring(scatter([("a", 100, 1.0, 0), ("b", 50, 1.0, 0)], ["a"], "x", "y"))
    up = [float(label.text) for label in picture.findall("text[@class='tick end']")]
    assert len(up) >= 2 and max(up) == 1.0


def test_equal_values_make_a_picture():
    ET.fromstring(scatter([("a", 100, 1.0, 0)], ["a"], "x", "y"))
    ET.fromstring(heat_map([[1.0, 1.0]], "head", "layer"))


def test_heat_map_and_strip_scale():
    shares = re.findall(r"--share:(\d+)%", heat_map([[1e-3, 1e-2], [1e-1, 1.0]], "head", "layer"))
    assert shares == ["0", "33", "67", "100"]
    bars = ET.fromstring(strip([1.0, 0.25, 0.0], [True, False, True]))
    heights = [float(bar.get("height")) for bar in bars.findall("rect") if bar.get("class") is None]
    assert heights == [4.0, 1.0, 0.0]
    assert len(bars.findall("circle")) == 2
