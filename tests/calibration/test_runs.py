"""A run over samples: their answers, interruptions, several processes, and what is refused."""

import signal

import numpy as np
import pytest
import torch

import vis_sparse
from vis_sparse.calibration import sums
from vis_sparse.calibration.measure import calibrate
from vis_sparse.calibration.records import SampleError
from vis_sparse.calibration.samples import answer_rows, answered
from vis_sparse.patches.errors import PatchError
from vis_sparse.plans.scores import Calibration

from ..models import make_model
from .samples import launch, make_sample, make_samples


def test_a_sample_without_an_answer_gets_the_models_own():
    model = make_model()
    prompt = make_sample(model, answer=0)
    given = answered(model, prompt, 3)
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=3)
    assert torch.equal(given["input_ids"], tokens)
    assert torch.equal(given["labels"][0, -3:], tokens[0, -3:])
    assert answer_rows(given).tolist() == list(range(tokens.shape[1] - 4, tokens.shape[1] - 1))
    np.testing.assert_array_equal(calibrate(model, [prompt], max_new_tokens=3).ratios, calibrate(model, [given]).ratios)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, monkeypatch, kill_at):
    monkeypatch.setattr(sums, "_SAVE_SECONDS", 0)
    model = make_model()
    samples, out = make_samples(model, 5), tmp_path / "a.safetensors"

    def kill(done):
        if done == kill_at:
            raise Killed

    with pytest.raises(Killed):
        calibrate(model, samples, out=out, on_sample=kill)
    steps = []
    resumed = calibrate(model, samples, out=out, on_sample=steps.append)
    assert steps == list(range(kill_at + 1, 6))
    whole = calibrate(model, samples, out=tmp_path / "b.safetensors")
    assert out.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for name in ("heads", "ratios", "text_mass", "attention_change", "ffn_change", "neurons"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_file(tmp_path):
    assert launch("calibrate", tmp_path / "a.safetensors", 3).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors.partial"]
    for name in ("a.safetensors", "b.safetensors"):
        assert launch("calibrate", tmp_path / name).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    accelerate = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0", "-m")
    shared = launch("calibrate", tmp_path / "a.safetensors", launcher=accelerate)
    assert shared.returncode == 0, shared.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    model, loaded = make_model(), Calibration.load(tmp_path / "a.safetensors")
    alone = calibrate(model, make_samples(model, 5))
    np.testing.assert_array_equal(loaded.ratios, alone.ratios)
    for name in ("heads", "effects", "mass", "text_mass", "attention_change", "ffn_change", "neurons"):
        np.testing.assert_allclose(getattr(loaded, name), getattr(alone, name), rtol=1e-6)
    assert loaded.metadata == alone.metadata


def test_sums_of_other_samples_or_another_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "_SAVE_SECONDS", 0)
    model = make_model()
    samples, out = make_samples(model, 3), tmp_path / "a.safetensors"

    def kill(done):
        raise Killed

    with pytest.raises(Killed):
        calibrate(model, samples, out=out, on_sample=kill)
    with pytest.raises(SampleError, match="is of other samples"):
        calibrate(model, samples[1:], out=out)
    with pytest.raises(SampleError, match="is of a run with another weights"):
        calibrate(make_model(seed=1), samples, out=out)


def test_what_cannot_be_measured_is_refused():
    model = make_model()
    sample = make_sample(model)
    with pytest.raises(SampleError, match="samples: got none"):
        calibrate(model, [])
    with pytest.raises(SampleError, match="sample 1: got no visual tokens"):
        calibrate(model, [sample, make_sample(model, (5,), 2) | {"pixel_values": None}])
    with pytest.raises(SampleError, match="sample 0: got an empty answer"):
        calibrate(model, [sample | {"labels": torch.full_like(sample["labels"], -100)}])
    with pytest.raises(SampleError, match="sample 0: input_ids: got 2 sequences"):
        calibrate(model, [{name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in sample.items()}])
    with pytest.raises(PatchError, match="got a patched model"), vis_sparse.patched(model, "dense"):
        calibrate(model, [sample])
