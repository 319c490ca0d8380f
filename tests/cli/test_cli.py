"""The command line: what it prints, what it writes as JSON, and how it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from vis_sparse.cli.main import app
from vis_sparse.cli.options import bar
from vis_sparse.cost.flops import flops
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.eval.numbers import human
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.patches.errors import PatchError
from vis_sparse.plans.budgets import resolve_heads
from vis_sparse.plans.files import as_plan, plan_names
from vis_sparse.plans.scores import Calibration

runner = CliRunner()


def run(*arguments):
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def read_json(*arguments):
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def rows(text, first):
    """The printed lines whose first word is in `first`, split into words."""
    return [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in first]


def example_of(*command):
    """The words after `vis-sparse` of the example in a command's help."""
    help_text = " ".join(run(*command, "--help").stdout.split())
    assert "--json" in help_text
    return help_text.split("Example: vis-sparse ")[1].split()


@pytest.mark.parametrize("command", [("flops",), ("plan", "list"), ("plan", "show")])
def test_help_shows_an_example_that_runs(command):
    example = example_of(*command)
    assert tuple(example[: len(command)]) == command
    assert run(*example).exit_code == 0


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_help_of_the_commands_that_run_models(command):
    assert example_of(command)[0] == command


def test_demo_takes_heads_from_the_calibration_it_is_given(tmp_path):
    shipped = Calibration.load(checkpoint() / "heads.safetensors")
    by_layer = ("heads", "mass", "effects", "text_mass", "attention_change", "ffn_change", "neurons")
    shallow = {name: getattr(shipped, name)[:6] for name in by_layer} | {"ratios": shipped.ratios[:, :6]}
    Calibration(**{**vars(shipped), **shallow}).save(tmp_path / "shallow.safetensors")
    result = run("demo", "--calibration", tmp_path / "shallow.safetensors", "--out", tmp_path / "out")
    given = "calibration: got those of a LlavaForConditionalGeneration called 'llava'"
    assert result.exit_code == 2 and f"{given} with 6 layers, expected the model's 8" in result.output
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    code = "import sys; import vis_sparse.cli.main; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_plan_list_names_every_plan_with_its_share():
    data = read_json("plan", "list", "--model", "llava-1.5-13b")
    assert [row["name"] for row in data["plans"]] == plan_names()
    shares = {row["name"]: row["share"] for row in data["plans"]}
    assert shares["dense"] == 1
    assert shares["vtw"] == 0.5
    assert 0.11 < shares["yopo-12"] < 0.12
    printed = run("plan", "list").stdout
    for name in plan_names():
        assert name in printed


def test_plan_show_draws_one_row_a_layer():
    printed = run("plan", "show", "yopo-12").stdout
    layers = rows(printed, {str(i) for i in range(32)})
    assert len(layers) == 32
    assert layers[0] == ["0", "●", "text", "▣", "5x5", "both", "██████", "32", "█▌····", "25%", *layers[0][10:]]
    assert layers[0][10:14] == ["262.4", "G", "143.0", "G"]
    assert layers[0][-1] == "55%"
    assert "unread after" in " ".join(layers[15])
    assert layers[16][:5] == ["16", "·", "·", "none", "·"]
    assert "1.702 T of 8.397 T FLOPs (20.3%)" in " ".join(printed.split())
    visual, dense = (flops("llava-1.5-7b", plan).prefill.lane("visual") for plan in ("yopo-12", "dense"))
    alone = f"{human(visual)} of {human(dense)} ({visual / dense:.1%})"
    assert f"For the visual tokens alone, as search --budget counts: {alone}" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80


def test_plan_show_json_says_the_same():
    data = read_json("plan", "show", "vica", "--convention", "paper")
    assert [row["layer"] for row in data["layers"] if row["text_reads"]] == [0, 1, 7, 8, 9, 10, 11, 14]
    assert data["flops"] == sum(row["flops"] for row in data["layers"])
    assert data["dense_flops"] == flops("llava-1.5-7b", "dense", convention="paper").total
    assert (data["visual_flops"], data["dense_visual_flops"]) == (data["flops"], data["dense_flops"])
    hollow = read_json("plan", "show", "hollow")["layers"]
    assert hollow[31]["attention"] == {"radius": 2, "direction": "causal", "frames": 0, "stride": 1}
    assert (hollow[31]["heads"], hollow[31]["ffn"], hollow[0]["attention"]) == (32, 0.5, "full")


def test_plan_show_takes_a_file_with_masks_and_neurons(tmp_path):
    mask = ", ".join(["true"] * 3 + ["false"] * 29)
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nlayers: {{0: {{heads: [{mask}], ffn: [0, 1, 2]}}}}")
    first = read_json("plan", "show", path)["layers"][0]
    assert (first["heads"], first["ffn"]) == (3, 3 / 11008)
    assert "mine on llava-1.5-7b" in run("plan", "show", path).stdout


BOTH = """
name: both
default: {ffn: 0.5}
tower:
  default: {attention: {radius: 0, stride: 8}, heads: {keep: 0.5}, ffn: 0.5}
  layers: {3: {attention: full, tokens: {keep: 0.5, by: norm}}, <25%: off}
"""


def test_a_tower_section_is_drawn_and_counted(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(BOTH)
    printed = run("plan", "show", path).stdout
    tower = printed[printed.index("vision tower") :]
    assert "50% by norm" in tower and "· not read" in tower and "· off" in tower
    assert max(map(len, printed.splitlines())) <= 80
    data = read_json("plan", "show", path)
    assert [row["off"] for row in data["tower"]] == [index == 5 for index in range(24)]
    assert data["tower"][0]["attention"] == {"radius": 0, "direction": "both", "frames": 0, "stride": 8}
    counted = read_json("flops", "--plan", f"dense,{path}")
    own, dense = counted["plans"][1]["prefill"], counted["dense"]["prefill"]
    assert own["whole"] == data["prefill_flops"] < own["total"] + dense["vision_tower"]
    assert counted["plans"][1]["whole_of_dense"] == own["whole"] / dense["whole"]
    printed = run("flops", "--plan", f"dense,{path}", "--device", "h100").stdout
    assert "vision_tower" in printed and max(map(len, printed.splitlines())) <= 80
    assert read_json("plan", "show", "vica")["tower"] is None


def test_tokens_before_the_decoder_are_drawn_and_counted(tmp_path):
    paths = {}
    for name, before in (("half", "{keep: 0.5, by: received}"), ("flat", "{by: duplicate}")):
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(f"name: {name}\nbefore: {before}\n")
    printed = " ".join(run("plan", "show", paths["half"]).stdout.split())
    assert "Before the decoder, 50% by received: 288 of 576 visual tokens come into the first layer" in printed
    assert "duplicates of their neighbours leave: how many, pixels decide" in " ".join(
        run("plan", "show", paths["flat"]).stdout.split()
    )
    data = read_json("plan", "show", paths["half"])
    assert data["before"] == {"keep": 0.5, "by": "received"}
    assert {row["visual_tokens"] for row in data["layers"]} == {288}
    assert read_json("plan", "show", "vica")["before"] is None
    told = ("flops", "--plan", f"{paths['half']},{paths['flat']}", "--duplicates", 0.5)
    half, flat = read_json(*told)["plans"]
    assert half["total"] == flat["total"]
    assert flat["prefill"]["vision_tower"] < half["prefill"]["vision_tower"]
    result = run("flops", "--plan", paths["flat"], "--duplicates", 1)
    assert result.exit_code and "duplicates: got 1.0, expected a share in [0, 1)" in result.stderr


def test_flops_of_one_plan_by_part_and_by_layer():
    printed = run("flops", "--plan", "yopo-25").stdout
    assert rows(printed, {"ffn"}) == [["ffn", "1.169", "T", "554.1", "G", "5.541", "T", "8.657", "G"]]
    assert rows(printed, {"decoder"})[0][:7] == ["decoder", "1.784", "T", "832.2", "G", "8.397", "T"]
    assert len(rows(printed, {str(i) for i in range(32)})) == 32
    assert "(34.3%): vision tower 381.9 G of 381.9 G, projector 24.16 G" in " ".join(printed.split())


def test_flops_of_several_plans_side_by_side():
    printed = run("flops", "--plan", "dense, vtw,yopo-12", "--convention", "paper").stdout
    table = {row[0]: row[1:] for row in rows(printed, {"dense", "vtw", "yopo-12"})}
    assert table["dense"][:2] == ["7.634", "T"]
    assert "2.00x" in table["vtw"]
    assert "8.35x" in table["yopo-12"]
    assert max(map(len, printed.splitlines())) <= 80


def test_files_are_counted_under_the_names_of_their_plans(tmp_path):
    for stem in ("a", "b"):
        (tmp_path / f"{stem}.yaml").write_text("name: found")
    counted = read_json("flops", "--plan", f"vtw,{tmp_path / 'a.yaml'},{tmp_path / 'b.yaml'}")["plans"]
    assert [plan["plan"] for plan in counted] == ["vtw", "found (a)", "found (b)"]


def test_flops_settings_reach_the_count():
    data = read_json(
        *("flops", "--model", "llava-next-7b", "--plan", "dense,auto", "--image-size", "672x336", "--images", 2),
        *("--batch", 3, "--text-tokens", 100, "--text-before", 10),
    )
    settings = {"image_size": (336, 672), "images": 2, "batch": 3, "text_tokens": 100, "text_before": 10}
    dense, auto = (flops("llava-next-7b", plan, **settings) for plan in ("dense", "auto"))
    assert data["dense"] == json.loads(json.dumps(dense.to_dict()))
    shares = {"of_dense": auto.total / dense.total, "whole_of_dense": auto.prefill.whole / dense.prefill.whole}
    assert data["plans"][1] == json.loads(json.dumps(auto.to_dict())) | shares


def test_frames_of_a_video_reach_the_count():
    data = read_json("flops", "--model", "qwen2-vl-7b", "--image-size", "640x448", "--video-frames", 16)
    video = flops("qwen2-vl-7b", "dense", image_size=(448, 640), video_frames=16)
    assert data["dense"] == json.loads(json.dumps(video.to_dict()))
    assert data["dense"]["visual_tokens"] == 8 * 16 * 23


def test_fewer_text_tokens_than_the_default_before_the_image():
    assert read_json("flops", "--text-tokens", 8)["dense"]["text_tokens"] == 8
    result = run("flops", "--text-tokens", 8, "--text-before", 9)
    assert (result.exit_code, result.stderr) == (2, "vis-sparse: text_before: got 9, expected 0 to the 8 text tokens\n")


def test_json_to_a_file_leaves_the_table_on_stdout(tmp_path):
    path = tmp_path / "out.json"
    result = run("flops", "--plan", "vtw", "--json", path)
    assert "by layer" in result.stdout
    assert json.loads(path.read_text()) == read_json("flops", "--plan", "vtw")


def test_a_checkpoint_folder_is_a_model(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=100)
    vision = CLIPVisionConfig(image_size=96, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    LlavaConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path / "mini")
    data = read_json("flops", "--model", tmp_path / "mini", "--plan", "yopo-25")
    assert (data["model"], data["dense"]["visual_tokens"], len(data["dense"]["prefill"]["layers"])) == ("mini", 144, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flops", "--plan", "yopo-13"), "plan: got 'yopo-13', expected a file or one of"),
        (("flops", "--plan", ","), "plan: got ',', expected one name or several with commas between them"),
        (("flops", "--model", "llava-1.5"), "model: got 'llava-1.5', expected a folder with a config.json or one of"),
        (("flops", "--image-size", "672"), "image-size: got '672', expected WIDTHxHEIGHT in pixels, like 672x336"),
        (("flops", "--video-frames", 8), "video_frames: got 8, expected 0: llava-1.5-7b has no rule for videos"),
        (("flops", "--convention", "tflops"), "convention: got 'tflops', expected one of executed, paper, macs, fastv"),
        (("plan", "show", "nothing"), "plan: got 'nothing', expected a file or one of"),
    ],
)
def test_errors_are_one_line_on_stderr(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"vis-sparse: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ("flops",), ("plan", "list"), ("plan", "show", "auto"), ("bench",),
        ("calibrate", "--data", "tiny-train", "--out", "no.safetensors"),
        ("search", "--data", "tiny-train", "--out", "no.yaml"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["/no/such/folder", "./none", "no/such/folder"])
def test_a_folder_that_is_not_there_is_told(command, folder):
    result = run(*command, "--model", folder)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"vis-sparse: model: got {folder!r}, no such folder; expected a checkpoint's")
    assert all(name in result.stderr for name in ("tiny/llava", "tiny/internvl", "llava-1.5-7b"))


@pytest.mark.parametrize("name", ["nothing", "nobody/nothing"])
def test_what_may_be_a_name_of_the_hub_is_tried(name, monkeypatch):
    import transformers

    def asked(given, **settings):
        raise OSError(f"looked for {given}")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", asked)
    result = run("calibrate", "--data", "tiny-train", "--out", "no.safetensors", "--model", name)
    assert result.exit_code == 2 and f"(looked for {name})" in result.stderr


def test_a_broken_plan_file_is_one_line_too(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("default: {ffn: [\n")
    result = run("plan", "show", path)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"vis-sparse: {path}: not YAML: ")


@pytest.mark.parametrize(("error", "exit_code"), [(PatchError("two\nlines"), 2), (ValueError("a bug"), 1)])
def test_errors_of_patching_are_one_line_and_bugs_are_not_hidden(error, exit_code):
    program = typer.Typer(cls=type(typer.main.get_command(app)))

    @program.command()
    def fails():
        raise error

    @program.command()
    def other():
        pass

    result = runner.invoke(program, ["fails"])
    assert result.exit_code == exit_code
    assert result.stderr == ("vis-sparse: two lines\n" if exit_code == 2 else "")
    assert (result.exception is error) == (exit_code == 1)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1.000 k"), (26_240_000_000, "26.24 G"), (7.6343e14, "763.4 T")]
)
def test_numbers_have_four_digits(count, text):
    assert human(count) == text


@pytest.mark.parametrize(
    ("share", "cells"), [(0, "····"), (1, "████"), (0.5, "██··"), (0.001, "▏···"), (0.28125, "█▏··")]
)
def test_bars(share, cells):
    assert bar(share, 4).plain == cells


@pytest.fixture
def calibration(tmp_path):
    """Of the shipped tiny LLaVA's size: heads 3 and 6 matter in layers 0 and 1, none of the others."""
    shape = load_shape(str(checkpoint()))
    heads, neurons = np.zeros((shape.layers, shape.heads)), np.tile(np.arange(shape.ffn), (shape.layers, 1))
    heads[:2, [3, 6]] = 1
    zeros = {name: np.zeros((shape.layers, 2)) for name in ("attention_change", "ffn_change")}
    found = Calibration(heads, heads, heads, heads[None], heads[:, 0], neurons=neurons, metadata={}, **zeros)
    found.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


@pytest.fixture
def budgets(tmp_path):
    """A sixteenth of all heads over the model: as many in every layer for lack of scores, or those that matter."""
    budget = "{attention: none, ffn: {keep: 0.5}, heads: {keep: 0.0625, over: model}}"
    (tmp_path / "plan.yaml").write_text(f"name: mine\ndefault: {budget}\n")
    return tmp_path / "plan.yaml"


def test_a_calibration_says_which_heads_budgets_keep(calibration, budgets):
    common = ("--model", checkpoint(), "--calibration", calibration)
    shown = read_json("plan", "show", budgets, *common)
    assert [layer["heads"] for layer in shown["layers"]] == [2, 2, 0, 0, 0, 0, 0, 0]
    assert {layer["ffn"] for layer in shown["layers"]} == {0.5}
    counted = read_json("flops", "--plan", budgets, *common)["plans"][0]
    plan = resolve_heads(as_plan(budgets, 8), 8, 8, None, calibration)
    assert counted["total"] == flops(load_shape(str(checkpoint())), plan).total
    assert counted["total"] < read_json("flops", "--plan", budgets, *common[:2])["plans"][0]["total"]
    refused = run("flops", "--plan", budgets, "--calibration", calibration)
    assert refused.exit_code == 2 and "with 8 layers, expected the model's 32" in refused.output


def test_bench_takes_a_calibration(calibration, budgets):
    common = ("--model", checkpoint(), "--plan", budgets, "--repeats", 1, "--text-tokens", 4)
    scored = read_json("bench", *common, "--calibration", calibration)
    assert scored["flops_visual"] < read_json("bench", *common)["flops_visual"]
    refused = run("bench", *common, "--calibration", calibration, "--peers")
    assert refused.exit_code == 2 and "expected none" in refused.output
