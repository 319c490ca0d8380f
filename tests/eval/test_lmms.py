"""lmms-eval with the model `vis_sparse`: its own program, and `vis-sparse eval`, on the shipped tiny LLaVA."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

import vis_sparse
from vis_sparse.cli.main import app
from vis_sparse.cost.flops import flops
from vis_sparse.eval.tasks import folder
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.eval.tiny.data import grid_scene, questions
from vis_sparse.eval.tiny.score import answers

HEADS = checkpoint() / "heads.safetensors"
MODEL = f"pretrained={checkpoint()},dtype=float32,calibration={HEADS}"
LIMIT = 5


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """No network, one thread, and caches that the tests make themselves."""
    cache = str(tmp_path_factory.mktemp("cache"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | offline | {"XDG_CACHE_HOME": cache, "HF_HOME": cache}


@pytest.fixture(scope="module")
def here(environment):
    """The same for what is run in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
        patched.setenv("LMMS_EVAL_DATASETS_CACHE", environment["HF_HOME"])
        yield


def _lmms_eval(environment, *arguments, launcher=("-m", "lmms_eval")):
    command = [sys.executable, *launcher, *arguments]
    done = subprocess.run(command, env=environment, cwd=environment["HF_HOME"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _files(out):
    """{plan: (its results, its samples by number)} from the files of lmms-eval's own."""
    found = {}
    for file in sorted(Path(out).rglob("*_results.json")):
        results = json.loads(file.read_text())
        (lines,) = (p.read_text() for p in file.parent.glob(file.name.replace("results.json", "samples_*.jsonl")))
        samples = {sample["doc_id"]: sample for sample in map(json.loads, lines.splitlines())}
        found[file.parents[1].name] = results, samples
    return found


@pytest.fixture(scope="module")
def runs(environment, tmp_path_factory):
    """Dense and yopo-12 by `python -m lmms_eval`, one process for both."""
    folder_ = tmp_path_factory.mktemp("runs")
    common = {
        "model": "vis_sparse",
        "tasks": "digit_grid_count",
        "include_path": str(folder()),
        "limit": LIMIT,
        "device": "cpu",
        "log_samples": True,
        "verbosity": "DEBUG",  # an error ends the program
    }
    plans = {"dense": f"{MODEL},plan=dense", "yopo-12": f"{MODEL},plan=yopo-12,paired=2"}
    configs = [{**common, "model_args": args, "output_path": str(folder_ / plan)} for plan, args in plans.items()]
    (folder_ / "config.yaml").write_text(json.dumps(configs))
    table = _lmms_eval(environment, "--config", str(folder_ / "config.yaml"))
    return _files(folder_), table


def _right(plan):
    """The answers that the project's own scorer gets, and whether they are right."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint())
    asked = questions("count", LIMIT)
    if plan != "dense":
        vis_sparse.patch(model, plan, calibration=HEADS)
    given = [answers(model, processor, [question])[0] for question in asked]
    return given, [float(words == question.answer) for words, question in zip(given, asked)]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dense", "yopo-12"])
def test_lmms_eval_scores_as_the_own_scorer(runs, plan):
    results, samples = runs[0][plan]
    given, right = _right(plan)
    assert [samples[number]["filtered_resps"] for number in range(LIMIT)] == given
    assert [samples[number]["exact_match"] for number in range(LIMIT)] == right
    assert results["results"]["digit_grid_count"]["exact_match,none"] == pytest.approx(sum(right) / LIMIT)


def _counted(plan):
    """`vis-sparse flops` for the layout of these prompts, which are of one length."""
    question = questions("count", 1)[0]
    processor = AutoProcessor.from_pretrained(checkpoint())
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    tokens = processor(images=[question.image], text=[text])["input_ids"][0]
    image = processor.image_token_id
    counted = {"--text-tokens": len(tokens) - tokens.count(image), "--text-before": tokens.index(image)}
    arguments = [str(word) for pair in counted.items() for word in pair]
    done = CliRunner().invoke(app, ["flops", "--model", str(checkpoint()), "--plan", plan, *arguments, "--json", "-"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    return data["plans"][0], data["dense"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dense", "yopo-12"])
def test_costs_are_those_of_vis_sparse_flops(runs, plan):
    (results, samples), table = runs[0][plan], runs[1]
    own, dense = _counted(plan)
    for sample in samples.values():
        (cost,) = sample["token_counts"]
        assert (cost["visual_tokens"], cost["text_tokens"]) == (144, 11)
        assert (cost["flops"], cost["flops_dense"]) == (own["total"], dense["total"])
        assert (cost["kv_bytes"], cost["kv_bytes_dense"]) == (2 * own["kv_bytes"], 2 * dense["kv_bytes"])  # fp32
        assert cost["seconds"] > 0
    averages = results["results"]["digit_grid_count"]
    assert averages["gflops,none"] == pytest.approx(own["total"] / 1e9)
    assert averages["gflops_dense,none"] == pytest.approx(dense["total"] / 1e9)
    assert averages["kv_mib,none"] == pytest.approx(own["kv_bytes"] / 2**19)
    seconds = [sample["token_counts"][0]["seconds"] for sample in samples.values()]
    assert averages["latency_ms,none"] == pytest.approx(1e3 * sum(seconds) / len(seconds))
    assert all(column in table for column in ("gflops", "kv_mib", "latency_ms", "speedup"))


@pytest.mark.slow
def test_paired_samples_have_both_times(runs):
    results, samples = runs[0]["yopo-12"]
    paired = [sample for sample in samples.values() if "seconds_dense" in sample["token_counts"][0]]
    assert len(paired) == 2
    ratios = [s["token_counts"][0]["seconds_dense"] / s["token_counts"][0]["seconds"] for s in paired]
    assert results["results"]["digit_grid_count"]["speedup,none"] == pytest.approx(sum(ratios) / 2)
    assert not any("seconds_dense" in sample["token_counts"][0] for sample in runs[0]["dense"][1].values())


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(runs, environment, tmp_path):
    arguments = ["--model", "vis_sparse", "--model_args", f"{MODEL},plan=yopo-12", "--tasks", "digit_grid_count"]
    arguments += ["--include_path", str(folder()), "--limit", str(LIMIT), "--device", "cpu", "--verbosity", "DEBUG"]
    arguments += ["--log_samples", "--output_path", str(tmp_path / "yopo-12")]
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    _lmms_eval(environment | {"ACCELERATE_USE_CPU": "true"}, "-m", "lmms_eval", *arguments, launcher=launcher)
    ((results, samples),) = _files(tmp_path).values()
    before, samples_before = runs[0]["yopo-12"]
    assert list(samples) != sorted(samples)  # the second process's come last
    for number, sample in samples_before.items():
        for name in ("filtered_resps", "exact_match", "gflops", "kv_mib"):
            assert samples[number][name] == sample[name]
    for name in ("exact_match,none", "gflops,none", "kv_mib,none"):
        assert results["results"]["digit_grid_count"][name] == before["results"]["digit_grid_count"][name]


def _eval(out, *arguments):
    done = CliRunner().invoke(app, ["eval", "--out", str(out), "--json", "-", "--timed", "0", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on(environment, here, tmp_path):
    arguments = ["--plan", "dense,yopo-12", "--tasks", "digit_grid_exists", "--limit", "3"]
    command = [str(Path(sys.executable).parent / "vis-sparse"), "eval", "--out", str(tmp_path), "--timed", "0"]
    first, second = (tmp_path / "digit_grid_exists" / f"{plan}.json" for plan in ("dense", "yopo-12"))
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen([*command, *arguments], env=environment, stderr=file) as process:
        while not first.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert first.exists() and not second.exists(), log.read_text()[-3000:]
    written = first.stat().st_mtime_ns
    rows, told = _eval(tmp_path, *arguments)
    assert [(row["plan"], row["samples"]) for row in rows] == [("dense", 3), ("yopo-12", 3)]
    assert first.stat().st_mtime_ns == written and second.exists()
    assert "[1/2] dense on digit_grid_exists (from" in told and "[2/2] yopo-12 on digit_grid_exists\n" in told
    assert rows[1]["same_as_dense"] == pytest.approx(sum(_same(tmp_path)) / 3)
    with (tmp_path / "results.csv").open() as file:
        assert [line["plan"] for line in csv.DictReader(file)] == ["dense", "yopo-12"]
    assert "| digit_grid_exists | yopo-12 | exact_match |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    # other settings are another run
    _eval(tmp_path, "--plan", "dense", "--tasks", "digit_grid_exists", "--limit", "2")
    assert first.stat().st_mtime_ns > written


def _same(out):
    lines = [
        (out / "digit_grid_exists" / f"{plan}.digit_grid_exists.jsonl").read_text().splitlines()
        for plan in ("dense", "yopo-12")
    ]
    return [json.loads(a)["filtered_resps"] == json.loads(b)["filtered_resps"] for a, b in zip(*lines)]


def test_a_plan_of_a_file_is_told_by_its_name_and_drawn(here, tmp_path):
    found = vis_sparse.load_plan("vtw").resolve(8).replace(name="searched", about="Found.")
    (tmp_path / "a.yaml").write_text(found.to_yaml())
    plans = ("--plan", f"dense,{tmp_path / 'a.yaml'}", "--tasks", "digit_grid_exists", "--limit", "1")
    rows, told = _eval(tmp_path, *plans)
    assert [row["plan"] for row in rows] == ["dense", "searched"] and "Creating parquet" not in told
    assert rows == _eval(tmp_path, *plans)[0], "read from their files"
    dense, strip = (row["strip"] for row in rows)
    assert dense["shares"] == [1] * 8 and dense["share"] == 1 and all(dense["reads"])
    assert strip["about"] == "Found." and strip["reads"] == [layer.text_reads for layer in found.layers]
    prompt = {name: strip[name] for name in ("text_tokens", "visual_tokens")}
    counted = flops(checkpoint(), found, text_tokens=prompt["text_tokens"], text_before=2)
    whole = flops(checkpoint(), "dense", text_tokens=prompt["text_tokens"], text_before=2)
    assert prompt["visual_tokens"] == counted.visual_tokens == 144
    layers = zip(counted.prefill.layers, whole.prefill.layers)
    assert strip["shares"] == [layer.visual.total / every.visual.total for layer, every in layers]
    assert strip["share"] == counted.prefill.lane("visual") / whole.prefill.lane("visual")


def test_groups_and_conversations(here, tmp_path):
    rows, _ = _eval(tmp_path, "--plan", "dense", "--tasks", "digit_grid,digit_grid_turns", "--limit", "2")
    kinds = {"digit_grid_place", "digit_grid_count", "digit_grid_exists"}
    assert {row["task"] for row in rows} == {*kinds, "digit_grid_turns"}
    turns = {row["metric"]: row for row in rows if row["task"] == "digit_grid_turns"}
    assert set(turns) == {"exact_match", "first_turn", "later_turns"}
    lines = (tmp_path / "digit_grid_turns" / "dense.digit_grid_turns.jsonl").read_text().splitlines()
    scenes = _conversations()
    right = 0
    for scene, line in zip(scenes, map(json.loads, lines), strict=True):
        (given,) = line["filtered_resps"]
        assert line["target"] == [question.answer for question in scene.questions]
        assert given[0] == _dense_answer(scene.questions[0])
        right += sum(said == question.answer for said, question in zip(given, scene.questions, strict=True))
    assert turns["exact_match"]["value"] == pytest.approx(right / sum(len(scene.questions) for scene in scenes))


def _conversations():
    """The first two documents of the task, made anew."""
    rng = np.random.default_rng(0)
    return [grid_scene(rng, 4, "test") for _ in range(2)]


def _dense_answer(question):
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    return answers(model, AutoProcessor.from_pretrained(checkpoint()), [question])[0]


@pytest.fixture
def broken_image(here, tmp_path, monkeypatch):
    """A task of three questions; half of the second one's image is missing."""
    import datasets

    asked = questions("exists", 3)
    images = []
    for number, question in enumerate(asked):
        file = tmp_path / f"{number}.png"
        question.image.save(file)
        images.append({"path": None, "bytes": file.read_bytes()})
    images[1]["bytes"] = images[1]["bytes"][: len(images[1]["bytes"]) // 2]
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    features["answer"] = datasets.Value("string")
    columns = {"image": images, "question": [q.text for q in asked], "answer": [q.answer for q in asked]}
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "exists.parquet")
    (tmp_path / "broken.yaml").write_text(
        f"include: {folder() / '_question_yaml'}\ntask: broken\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'exists.parquet'}}}}}\n"
    )
    monkeypatch.setattr("vis_sparse.eval.lmms.run.folder", lambda: tmp_path)
    return asked


def test_a_broken_image_is_told_and_counts_as_wrong(broken_image, tmp_path):
    (row,), _ = _eval(tmp_path, "--plan", "yopo-12", "--tasks", "broken")
    assert row["samples"] == 3 and list(row["failed"]) == ["1"]
    assert "truncated" in row["failed"]["1"]
    lines = map(json.loads, (tmp_path / "broken" / "yopo-12.broken.jsonl").read_text().splitlines())
    assert [(line["filtered_resps"], line["exact_match"]) for line in lines] == [
        ([broken_image[0].answer], 1.0),
        ([""], 0.0),
        ([broken_image[2].answer], 1.0),
    ]
    assert row["value"] == pytest.approx(2 / 3)
    assert "sample 1 counts as wrong: OSError" in (tmp_path / "results.md").read_text()


def test_unknown_tasks_and_plans_are_refused(here, tmp_path):
    for arguments, said in (
        (["--tasks", "nonsense"], "tasks: got nonsense"),
        (["--plan", "nonsense", "--tasks", "easy_vqa"], "nonsense"),
    ):
        done = CliRunner().invoke(app, ["eval", "--out", str(tmp_path), *arguments])
        assert done.exit_code == 2 and said in done.stderr
