"""`bench --train`: a training step of plans beside the dense one."""

import json

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from typer.testing import CliRunner

from vis_sparse.cli.main import app
from vis_sparse.eval.bench_train import bench_train

SETTINGS = dict(layers=4, text_tokens=16, repeats=2, clock="process")


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A folder with the config of a narrow LLaVA of 36 visual tokens."""
    text = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=8,
                       num_key_value_heads=8, vocab_size=64)  # fmt: skip
    folder = tmp_path_factory.mktemp("shape")
    vision = CLIPVisionConfig(image_size=84, patch_size=14)
    LlavaConfig(text_config=text, vision_config=vision, image_seq_length=36).save_pretrained(folder)
    return str(folder)


def test_figures_of_a_step(shape):
    yopo, dense = bench_train(shape, ["yopo-12", "dense"], **SETTINGS)
    assert (yopo["plan"], dense["plan"], yopo["visual_tokens"]) == ("yopo-12", "dense", 36)
    for row in (yopo, dense):
        parts = row["forward_s"] + row["backward_s"] + row["optimizer_s"]
        assert parts > 0 and row["ratio"] > 0 and row["clock"] == "process"
        assert row["kept_bytes"] < row["peak_bytes"] and row["kept_bytes_dense"] == yopo["kept_bytes_dense"]
    assert yopo["flop_share"] < 0.6 < dense["flop_share"] == 1
    assert yopo["kept_bytes"] < 0.8 * yopo["kept_bytes_dense"]
    gradients = 4 * (4 * 64**2 + 3 * 64 * 192) * 4
    assert gradients < yopo["peak_bytes"]


def test_the_command(shape, tmp_path):
    command = ["bench", "--train", "--model", shape, "--layers", "4", "--text-tokens", "16", "--repeats", "1",
               "--plan", "vica,yopo-12+2"]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "b.json")])
    assert done.exit_code == 0 and "of dense" in done.output and "yopo-12+2" in done.output
    assert [row["plan"] for row in json.loads((tmp_path / "b.json").read_text())] == ["vica", "yopo-12+2"]
    for more in (["--decode"], ["--compile"], ["--peers"]):
        refused = CliRunner().invoke(app, [*command, *more])
        assert refused.exit_code == 2 and "got --train beside it" in refused.output
    assert CliRunner().invoke(app, [*command, "--clock", "sun"]).exit_code == 2

