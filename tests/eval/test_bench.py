"""The benchmark's figures hang together and are what the caches and the count say. No test looks at a time."""

import dataclasses
import json
import math

import pytest
import torch
import typer
from typer.testing import CliRunner

from vis_sparse.calibration.profiles import Target
from vis_sparse.calibration.samples import answer_rows
from vis_sparse.cli.bench import bench_command
from vis_sparse.cli.main import app as cli
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.eval.bench import bench
from vis_sparse.eval.bench_model import image_layout, image_samples, random_embeddings, random_model
from vis_sparse.eval.memory import PeakBytes, cache_bytes
from vis_sparse.eval.timing import in_turns, paired_ratio
from vis_sparse.eval.tiny import checkpoint

TIMES = ("dense_s", "dense_plan_s", "patched_s", "speedup", "flop_ratio", "efficiency", "efficiency_vs_dense_plan")
KEYS = {"kv_bytes", "kv_bytes_dense", "peak_bytes", "tower_layers", "machine", "versions", "date"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shape():
    small = {"layers": 4, "hidden": 64, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 128}
    return dataclasses.replace(load_shape("llava-1.5-7b"), **small)


@pytest.fixture(scope="module")
def results():
    return bench(str(checkpoint()), ["dense", "shortv", "yopo-12"], layers=4, text_tokens=10, repeats=2, decode=True)


def test_keys_and_identities(results):
    for row in results:
        assert not KEYS - set(row)
        assert row["tower_layers"] == 2, "of 4, as 4 of the decoder's 8"
        for prefix in ("", "decoder_", "decode_"):
            assert not {prefix + name for name in TIMES} - set(row)
            dense, patched, speedup = (row[prefix + name] for name in ("dense_s", "patched_s", "speedup"))
            assert speedup == pytest.approx(dense / patched)
            assert row[prefix + "efficiency"] == pytest.approx(speedup / row[prefix + "flop_ratio"])
            over_dense_plan = row[prefix + "dense_plan_s"] / patched / row[prefix + "flop_ratio"]
            assert row[prefix + "efficiency_vs_dense_plan"] == pytest.approx(over_dense_plan)
            for name, (fastest, slowest) in row[prefix + "spread"].items():
                assert fastest <= row[prefix + name] <= slowest
        for variant in ("dense_s", "dense_plan_s", "patched_s"):
            assert row[variant] > row[f"decoder_{variant}"] > 0
        assert row["flops"] > row["decoder_flops"] + row["tower_flops"] > row["decoder_flops"]
        assert row["flop_ratio"] == row["flops_dense"] / row["flops"]
        json.dumps(row)


def test_dense_plan_is_measured_once_and_saves_nothing(results):
    dense = results[0]
    assert dense["flop_ratio"] == dense["decoder_flop_ratio"] == dense["decode_flop_ratio"] == 1
    assert dense["patched_s"] == dense["dense_plan_s"]
    assert dense["kv_bytes"] == dense["kv_bytes_dense"]


def test_ratios_and_bytes_are_those_of_the_plan(results):
    _, shortv, yopo = results
    assert 1 < shortv["flop_ratio"] < yopo["flop_ratio"] < yopo["decoder_flop_ratio"]
    assert yopo["kv_bytes"] < shortv["kv_bytes"] == shortv["kv_bytes_dense"], "shortv keeps every read"
    assert yopo["peak_bytes"] < yopo["peak_bytes_dense"]
    for row in (shortv, yopo):
        saved = row["kv_visual_bytes_dense"] - row["kv_visual_bytes"]
        assert row["kv_bytes_dense"] - row["kv_bytes"] == saved
        strip = row["strip"]
        assert strip["share"] == row["flops_visual"] / row["flops_visual_dense"] and strip["text_tokens"] == 10
        assert len(strip["shares"]) == len(strip["reads"]) == 4


def test_layout_of_a_sample_and_its_copies(shape):
    layout = image_layout(shape, 2, 64, None)
    assert [(s.sample, s.start, s.size) for s in layout.segments] == [(0, 35, 576), (1, 35, 576)]
    assert image_layout(shape, 1, 1, None).segments[0].start == 0
    several = image_layout(load_shape("llava-next-7b"), 1, 64, (672, 672))
    assert several.num_visual == sum(segment.size for segment in several.segments) == 2928


def test_turns_rotate_and_pair():
    order, told = [], []

    def measure(variant):
        order.append(variant)
        return {"s": len(order)}

    samples = in_turns("abc", measure, 3, lambda *turn: told.append(turn))
    assert told == [(done, 9) for done in range(1, 10)]
    assert "".join(order) == "abcbcacab"
    assert samples["a"]["s"] == [1, 6, 8]
    assert paired_ratio([2, 9, 8], [1, 3, 4]) == 2


def test_peak_counts_new_tensors_only():
    x = torch.zeros(1000)
    with PeakBytes() as memory:
        y = x + 1
        y.add_(1)
        view = y.view(10, 100).t()
        z = view @ view.t()
        assert memory.live == 4000 + z.nbytes
        del y, view, z
    assert memory.live == 0
    assert memory.peak == 4000 + 40000


def test_cache_bytes_count_whole_storages_once(shape):
    model = random_model(shape, torch.float32, CPU)
    layout = image_layout(shape, 1, 8, None)
    embeddings = random_embeddings(shape, layout, 8, torch.float32, CPU)
    with torch.no_grad():
        cache = model.model.language_model(inputs_embeds=embeddings, use_cache=True).past_key_values
    tokens = layout.num_visual + 8
    assert cache_bytes(cache) == shape.layers * 2 * tokens * shape.kv_heads * shape.head_dim * 4
    cache.layers[0].keys = cache.layers[0].keys[:, :, :1]
    assert cache_bytes(cache) == shape.layers * 2 * tokens * shape.kv_heads * shape.head_dim * 4


def test_random_model_is_reproducible_and_finite(shape):
    first, second = (random_model(shape, torch.bfloat16, CPU) for _ in range(2))
    for name, weight in first.named_parameters():
        assert weight.dtype == torch.bfloat16 and weight.isfinite().all(), name
        assert torch.equal(weight, dict(second.named_parameters())[name]), name
    layer = first.model.language_model.layers[0]
    assert math.isclose(layer.mlp.up_proj.weight.detach().float().std(), 0.02, rel_tol=0.1)


def test_command_writes_one_object_for_one_plan_and_a_list_for_several(tmp_path):
    app = typer.Typer()
    app.command()(bench_command)
    for plans, kind in (("auto", dict), ("auto,vtw", list)):
        file = tmp_path / f"{plans}.json"
        options = ["--model", str(checkpoint()), "--layers", "4", "--repeats", "1", "--plan", plans]
        done = CliRunner().invoke(app, [*options, "--json", str(file)])
        assert done.exit_code == 0, done.output
        assert isinstance(json.loads(file.read_text()), kind)
        assert "unpatched" in done.output and "dense plan" in done.output


def test_calibration_is_timed_beside_forward_passes(tmp_path):
    file = tmp_path / "a.json"
    options = ["--model", str(checkpoint()), "--layers", "2", "--samples", "7", "--repeats", "2", "--json", str(file)]
    done = CliRunner().invoke(cli, ["bench", "calibration", *options], catch_exceptions=False)
    assert done.exit_code == 0 and "calibrate, effects" in done.output
    forward, *ways = json.loads(file.read_text())
    assert forward["ratio"] == forward["flop_ratio"] == 1 and forward["visual_tokens"] == 144
    assert {row["way"] for row in ways} == {"effects", "mass"}
    for row in ways:
        assert row["flop_ratio"] == row["flops"] / forward["flops"] > 1 and row["ratio"] > 0
        assert row["spread"][0] <= row["s"] <= row["spread"][1]


def test_calibration_samples_have_the_shapes_image_and_text(shape):
    model = random_model(shape, torch.float32, CPU)
    first, second = image_samples(model, shape, 2, 64, 3)
    assert first["input_ids"].shape == (1, 576 + 64) and not torch.equal(first["input_ids"], second["input_ids"])
    visual = first["input_ids"] == model.config.image_token_index
    assert visual.sum() == Target.of(model).layout(first).num_visual == 576
    assert answer_rows(first).tolist() == [636, 637, 638]


def test_command_refuses_unknown_dtypes_and_devices():
    app = typer.Typer()
    app.command()(bench_command)
    for option, value in (("--dtype", "int4"), ("--device", "abacus")):
        done = CliRunner().invoke(app, [option, value])
        assert done.exit_code == 2
        assert value in done.output and "expected" in done.output
