"""What is kept, resumed or taken from a file is used for what it was made from, and says so when it does not fit."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vis_sparse
from vis_sparse.calibration import fingerprint, sums
from vis_sparse.calibration.measure import calibrate
from vis_sparse.calibration.records import SampleError
from vis_sparse.cost.flops import resolved
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.eval.demo import run_demo
from vis_sparse.eval.lmms import run as lmms_run
from vis_sparse.eval.lmms.run import Settings, evaluate
from vis_sparse.eval.tasks import tiny
from vis_sparse.eval.tiny import NAMES, checkpoint
from vis_sparse.eval.tiny import train as training
from vis_sparse.eval.tiny.families import FAMILIES
from vis_sparse.patches.calibrated import of_weights
from vis_sparse.plans.layer_plan import LayerPlan, NeuronBudget, PlanError
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.scores import Calibration
from vis_sparse.searching.search import meter_of, search_front

from .calibration.samples import make_samples
from .marks import slow_but
from .models import LAYERS, make_model

HALF = VisualPlan((LayerPlan(ffn=NeuronBudget(0.5)),) * LAYERS)


# A calibration


@pytest.fixture(scope="module")
def measured() -> Calibration:
    model = make_model(dtype=torch.float32)
    return calibrate(model, make_samples(model))


def other(measured: Calibration, **metadata) -> Calibration:
    return replace(measured, metadata=measured.metadata | metadata)


def fewer_neurons(measured: Calibration) -> Calibration:
    return replace(measured, neurons=measured.neurons[:, :32])


def refused(measured: Calibration, message: str) -> None:
    """By everything that takes a calibration for a model, which is left as it was."""
    model = make_model(dtype=torch.float32)
    with pytest.raises(PlanError, match=message):
        vis_sparse.patch(model, HALF, calibration=measured)
    assert vis_sparse.inspect(model) is None
    with pytest.raises(PlanError, match=message):
        next(search_front(model, make_samples(model), calibration=measured))


def test_a_calibration_of_other_sizes_is_refused(measured):
    """224 neurons must not choose among 352."""
    given = "calibration: got those of a LlavaForConditionalGeneration"
    refused(fewer_neurons(measured), f"^{given} with 32 neurons, expected the model's 48$")
    refused(other(measured, kv_heads="4"), f"^{given} with 4 KV heads, expected the model's 8$")
    fields = {name: getattr(measured, name)[:2] for name in ("heads", "neurons")}
    refused(replace(measured, **fields), f"^{given} with 2 layers, expected the model's 3$")
    refused(replace(measured, heads=measured.heads[:, :4]), f"^{given} with 4 heads, expected the model's 8$")


def test_a_calibration_of_another_class_is_refused(measured):
    refused(
        other(measured, **{"class": "Qwen2VLForConditionalGeneration", "model": "qwen2_vl"}),
        "got those of a Qwen2VLForConditionalGeneration called 'qwen2_vl', expected those of a "
        "LlavaForConditionalGeneration, the model's class",
    )


def test_so_are_files_of_head_scores_and_what_shapes_take(measured, tmp_path):
    file = tmp_path / "c.safetensors"
    other(measured, **{"class": "Qwen2VLForConditionalGeneration"}).save(file)
    model = make_model(dtype=torch.float32)
    with pytest.raises(PlanError, match="^heads: got those of a Qwen2VLForConditionalGeneration, expected those of"):
        vis_sparse.patch(model, HALF, heads=file)
    assert vis_sparse.inspect(model) is None
    shape = load_shape(str(checkpoint()))
    with pytest.raises(PlanError, match="with 224 neurons, expected the model's 352|with 4 KV heads, expected"):
        resolved("yopo-12", shape, checkpoint("qwen2_vl") / "heads.safetensors")
    with pytest.raises(PlanError, match="got those of a InternVLForConditionalGeneration called 'internvl', expected"):
        run_demo(4, "llava", calibration=checkpoint("internvl") / "heads.safetensors")


def told(model, **settings) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vis_sparse.unpatch(vis_sparse.patch(model, HALF, **settings))
    return [str(warning.message) for warning in caught]


def test_other_weights_are_told_and_used(measured, tmp_path):
    """A fine-tuned model goes on with the scores of its base."""
    tuned = make_model(seed=1, dtype=torch.float32)
    (message,) = told(tuned, calibration=measured)
    given = "those of a LlavaForConditionalGeneration with other weights"
    assert message.startswith(f"vis_sparse: calibration: got {given}")
    assert measured.metadata["weights"][:12] in message
    assert of_weights(tuned.model.language_model)[:12] in message
    measured.save(tmp_path / "c.safetensors")
    assert len(told(tuned, heads=tmp_path / "c.safetensors", calibration=tmp_path / "c.safetensors")) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_weights_in_another_precision_are_the_same(measured, dtype):
    assert told(make_model(dtype=torch.float32).to(dtype), calibration=measured) == []
    assert told(make_model(seed=1, dtype=torch.float32).to(dtype), calibration=measured) != []


def test_a_calibration_in_half_precision_knows_the_whole_weights():
    model = make_model(dtype=torch.float32)
    half = calibrate(make_model(dtype=torch.float32).bfloat16(), make_samples(model), scores="mass")
    assert told(model, calibration=half) == []
    assert told(make_model(seed=1, dtype=torch.float32), calibration=half) != []


@pytest.mark.parametrize("name", slow_but(NAMES, FAMILIES))
def test_shipped_calibrations_are_of_the_shipped_models(name):
    model = FAMILIES[name].MODEL.from_pretrained(checkpoint(name), dtype=torch.float32)
    assert told_by(model, checkpoint(name) / "heads.safetensors") == []


def told_by(model, file) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vis_sparse.patch(model, "yopo-12", calibration=file)
    return [str(warning.message) for warning in caught if "calibration" in str(warning.message)]


# Sums of a calibration that was interrupted, the log of a search, the state of a training


class Killed(Exception):
    pass


def kill(done):
    if done == 2:
        raise Killed


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """(model, samples, out) of a calibration that was stopped after two of three samples."""
    monkeypatch.setattr(sums, "_SAVE_SECONDS", 0)
    model = make_model()
    samples, out = make_samples(model), tmp_path / "c.safetensors"
    with pytest.raises(Killed):
        calibrate(model, samples, out=out, on_sample=kill)
    return model, samples, out


def test_sums_of_more_samples_are_refused(stopped):
    model, samples, out = stopped
    with pytest.raises(SampleError, match="partial: .* is of 2 samples at least, expected no more than the 1 of"):
        calibrate(model, samples[:1], out=out)
    assert not out.exists()
    calibrate(model, samples, out=out)


@pytest.mark.parametrize("part", ["multi_modal_projector", "vision_tower"])
def test_sums_of_another_vision_tower_are_refused(stopped, part):
    model, samples, out = stopped
    next(model.model.get_submodule(part).parameters()).data += 0.1
    with pytest.raises(SampleError, match="is of a run with another whole model"):
        calibrate(model, samples, out=out)


def test_half_a_file_of_sums_is_refused(stopped):
    model, samples, out = stopped
    partial = out.with_name("c.safetensors.partial")
    partial.write_bytes(partial.read_bytes()[:200])
    with pytest.raises(SampleError, match="c.safetensors.partial: expected what an interrupted run left"):
        calibrate(model, samples, out=out)


def test_a_search_log_is_of_a_model_its_samples_and_its_batches(tmp_path):
    model, log = make_model(), tmp_path / "log"
    samples = make_samples(model)
    meter_of(model, samples, batch=2, log=log)(VisualPlan.vtw(LAYERS, 1))
    with pytest.raises(SampleError, match="of a search with another batch"):
        meter_of(model, samples, batch=1, log=log)
    with pytest.raises(SampleError, match="of a search with another samples"):
        meter_of(model, samples[1:], batch=2, log=log)
    model.model.multi_modal_projector.linear_1.bias.data += 0.1
    with pytest.raises(SampleError, match="of a search with another weights"):
        meter_of(model, samples, batch=2, log=log)


def test_times_are_of_a_machine(tmp_path, monkeypatch):
    model, log = make_model("llama-gqa"), tmp_path / "log"
    samples = make_samples(model)

    def keys():
        return {json.loads(line)[0] for line in log.read_text().splitlines()[1:]}

    meter_of(model, samples, "time", log=log)
    first = keys()
    monkeypatch.setattr("vis_sparse.searching.layer_times.platform.node", lambda: "another")
    meter_of(model, samples, "time", log=log)
    assert first < keys()


def test_values_of_a_sample_that_are_no_tensors_count_too():
    sample = {"input_ids": torch.ones(1, 6, dtype=torch.long), "image_sizes": [(4, 6)]}
    changed = sample | {"image_sizes": [(6, 4)]}
    assert fingerprint.of_sample(sample) != fingerprint.of_sample(changed)
    reshaped = sample | {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    assert fingerprint.of_sample(sample) != fingerprint.of_sample(reshaped)


def test_a_training_goes_on_with_its_own_recipe(tmp_path, monkeypatch):
    state = training.Run("llava", tmp_path)
    state.save()
    training.Run("llava", tmp_path)
    with pytest.raises(ValueError, match="is of another model or recipe than qwen2_vl"):
        training.Run("qwen2_vl", tmp_path)
    shorter = (replace(training.RECIPES["llava"][0], steps=1),)
    monkeypatch.setitem(training.RECIPES, "llava", shorter)
    with pytest.raises(ValueError, match="is of another model or recipe than llava"):
        training.Run("llava", tmp_path)


# Scores of `vis-sparse eval`


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that may be changed, with a calibration, a plan and a mask."""
    shutil.copytree(checkpoint(), tmp_path / "model")
    np.save(tmp_path / "mask.npy", np.ones((8, 8), dtype=bool))
    (tmp_path / "plan.yaml").write_text(f"name: mine\ndefault: {{heads: {{file: {tmp_path / 'mask.npy'}}}}}\n")
    return tmp_path


@pytest.fixture
def measure(folder, monkeypatch, capsys):
    """() -> (what was measured, stderr). Nothing is run: what is measured is nothing, but kept as a run would be."""
    ran = []

    def nothing(model, settings, named, task, manager, file):
        ran.append(named["plan"])
        kept = {"settings": named, "samples": {}}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept))
        return kept

    monkeypatch.setattr(lmms_run, "_load", lambda settings: "a model")
    monkeypatch.setattr(lmms_run, "_run", nothing)

    def call(**changes):
        ran.clear()
        capsys.readouterr()
        settings = Settings(str(folder / "model"), 2, calibration=str(folder / "model" / "heads.safetensors"))
        evaluate(replace(settings, **changes), [str(folder / "plan.yaml")], ["digit_grid_count"], folder / "out")
        return bool(ran), capsys.readouterr().err

    return call


def change_weights(folder):
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    size = file.stat().st_size
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == size


def change_config(folder):
    file = folder / "model" / "config.json"
    file.write_text(file.read_text().replace("}", "} ", 1))


def change_calibration(folder):
    shutil.copy(checkpoint("internvl") / "heads.safetensors", folder / "model" / "heads.safetensors")


def change_mask(folder):
    np.save(folder / "mask.npy", np.zeros((8, 8), dtype=bool))


def change_plan(folder):
    with (folder / "plan.yaml").open("a") as file:
        file.write("layers: {0: {ffn: 0.5}}\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weights, "model (what is in it)"),
        (change_config, "model (what is in it)"),
        (change_calibration, "calibration (what is in it)"),
        (change_mask, "heads of {plan} (what is in it)"),
        (change_plan, "plan (what is in it)"),
    ],
)
def test_scores_are_of_what_is_in_the_files(folder, measure, change, named):
    assert measure() == (True, "")
    assert measure() == (False, ""), "a second run reads what is there"
    change(folder)
    ran, said = measure()
    kept = folder / "out" / "digit_grid_count" / "plan.json"
    named = named.format(plan=folder / "plan.yaml")
    assert ran and said.startswith(f"{kept}: is of another ") and named in said and said.endswith("; measured again\n")
    assert measure() == (False, "")


def test_scores_are_of_settings_tasks_and_versions(folder, measure, monkeypatch):
    measure()
    ran, said = measure(limit=3)
    assert ran and "is of another limit; measured again" in said
    monkeypatch.setattr(lmms_run, "made_by", lambda: "otherwise")
    ran, said = measure(limit=3)
    assert ran and "is of another tasks (what is in it); measured again" in said
    monkeypatch.setattr(lmms_run, "of_versions", lambda *names: {"torch": "3"})
    ran, said = measure(limit=3)
    assert ran and "torch (what is in it)" in said


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"settings": 3}'])
def test_half_a_file_of_scores_is_measured_again(folder, measure, text):
    measure()
    (folder / "out" / "digit_grid_count" / "plan.json").write_text(text)
    ran, said = measure()
    assert ran and said.endswith("plan.json: expected the results of an earlier run; measured again\n")


def test_large_weights_count_by_their_last_change(folder, monkeypatch):
    monkeypatch.setattr(fingerprint, "_WHOLE", 1 << 20)
    before = fingerprint.of_checkpoint(str(folder / "model"))
    assert fingerprint.of_checkpoint(str(folder / "model")) == before
    change_weights(folder)
    assert fingerprint.of_checkpoint(str(folder / "model")) != before


# Documents of the tasks


def test_documents_are_made_anew_for_other_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    class Documents:
        def to_parquet(self, path):
            made.append(path)
            path.write_text("documents")

    monkeypatch.setattr(tiny, "_questions", lambda kind: Documents())
    first = tiny._parquet("count_framed")
    assert tiny._parquet("count_framed") == first and len(made) == 1
    monkeypatch.setattr(FAMILIES["qwen2_vl"], "SIZES", ((80, 80),))
    second = tiny._parquet("count_framed")
    assert second != first and len(made) == 2
