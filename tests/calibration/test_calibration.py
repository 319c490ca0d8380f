"""Calibration: scores against full attention matrices, the pass over samples, files and data."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import vis_sparse
from vis_sparse.calibration import sums
from vis_sparse.calibration.attention_mass import visual_mass
from vis_sparse.calibration.measure import calibrate, has_effects
from vis_sparse.calibration.probe import Probe
from vis_sparse.calibration.profiles import Target
from vis_sparse.calibration.records import SampleError, read_records
from vis_sparse.calibration.samples import answer_rows, answered, with_answer
from vis_sparse.eval.data import records
from vis_sparse.eval.memory import PeakBytes
from vis_sparse.eval.tiny.data import questions
from vis_sparse.patches.errors import PatchError
from vis_sparse.plans.budgets import load_heads, resolve_heads
from vis_sparse.plans.layer_plan import HeadBudget, LayerPlan, Neighborhood, NeuronBudget, PlanError
from vis_sparse.plans.plan import VisualPlan, with_layer
from vis_sparse.plans.scores import Calibration, keep_heads

from .. import oracle
from ..models import HEADS, IMAGE, LAYERS, NEURONS, from_text_config, make_batch, make_model, text_inputs

NEVER = 1e9


def make_sample(model, parts=(3, IMAGE, 4), answer=2, seed=1) -> dict:
    batch = make_batch(model, [parts], seed=seed)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pixel_values": batch.pixel_values}
    tokens = torch.randint(1, 90, (answer,), generator=torch.Generator().manual_seed(seed))
    return with_answer(inputs, tokens) if answer else inputs


def make_samples(model, number=4) -> list[dict]:
    parts = [(3, IMAGE, 4), (1, IMAGE, 2, IMAGE, 1), (IMAGE, 5), (2, IMAGE, 3)]
    return [make_sample(model, parts[i % 4], 1 + i % 3, seed=i) for i in range(number)]


def matrices(model, sample):
    """Attention (layers, heads, length, length) of the eager model, and which columns are visual."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**{k: v for k, v in sample.items() if k != "labels"}, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return torch.stack(out.attentions)[:, 0].double(), sample["input_ids"][0] == model.config.image_token_id


@pytest.mark.parametrize("text", ["llama", "llama-gqa", "mistral-gqa", "qwen2-gqa"])
def test_scores_are_those_of_full_attention_matrices(text):
    model = make_model(text, dtype=torch.float32)
    samples = make_samples(model)
    result = calibrate(model, samples)
    ratios, mass = [], []
    for sample in samples:
        attention, visual = matrices(model, sample)
        rows = attention[:, :, answer_rows(sample)].mean(2)
        ratios.append(rows[..., visual].sum(-1) / rows[..., ~visual].sum(-1))
        after = ~visual & (torch.arange(len(visual)) > visual.nonzero()[0])
        mass.append(attention[:, :, after][..., visual].sum(-1).mean((1, 2)))
    torch.testing.assert_close(torch.from_numpy(result.ratios).double(), torch.stack(ratios), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(result.mass), torch.stack(ratios).mean(0).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.from_numpy(result.text_mass), torch.stack(mass).mean(0).float())


@pytest.mark.parametrize("text", ["llama", "llama-gqa"])
def test_effects_are_the_slopes_of_the_answers_log_probability(text):
    """Against the oracle with the visual part of every head halved: squares of the slopes by gates, over their sum."""
    model = make_model(text)
    sample = make_sample(model, answer=2)
    result = calibrate(model, [sample])
    assert all(parameter.requires_grad for parameter in model.parameters())
    rows = answer_rows(sample)
    labels = sample["labels"][0, rows + 1, None]

    def log_probability(layer, head, more):
        gates = torch.full((LAYERS, HEADS), 0.5, dtype=torch.float64)
        gates[layer, head] += more
        return gated_logits(model, sample, gates)[rows].log_softmax(-1).gather(1, labels).sum()

    heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    slopes = torch.tensor([log_probability(*place, 1e-5) - log_probability(*place, -1e-5) for place in heads])
    squares = slopes.square().view(LAYERS, HEADS)
    np.testing.assert_allclose(result.heads, squares / squares.sum(), rtol=1e-3)


def gated_logits(model, sample, gates):
    """Logits (length, vocabulary) of the dense model with each head's visual part scaled, by dense matrices."""
    batch_visual = sample["input_ids"][0] == model.config.image_token_id
    text = model.model.language_model
    x = text_inputs(model, **{k: v for k, v in sample.items() if k != "labels"})
    length = x.shape[1]
    rotary = text.rotary_emb(x, torch.arange(length)[None])
    causal = oracle.at_or_before(length)
    for layer, gate in zip(text.layers, gates, strict=True):
        module, h = layer.self_attn, oracle.norm(layer.input_layernorm, x)
        q, k, v = (
            proj(h).view(1, length, -1, module.head_dim).transpose(1, 2)
            for proj in (module.q_proj, module.k_proj, module.v_proj)
        )
        q, k = oracle.rotate(q, *rotary), oracle.rotate(k, *rotary)
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * module.head_dim**-0.5
        dense = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v
        alone = scores.masked_fill(~(causal & ~batch_visual) & ~torch.eye(length, dtype=torch.bool), -torch.inf)
        alone = (alone.softmax(-1) @ v).masked_fill(batch_visual[:, None], 0)
        mixed = gate[:, None, None] * dense + (1 - gate)[:, None, None] * alone
        x = x + module.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(oracle.norm(layer.post_attention_layernorm, x))
    return model.lm_head(oracle.norm(text.norm, x))[0].detach()


@pytest.mark.parametrize("block", [1, 5, 64])
def test_mass_in_blocks_of_keys(block):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(8, 3, 16, generator=generator) * 9, torch.randn(2, 20, 16, generator=generator)
    columns, visual = torch.tensor([4, 11, 19]), torch.arange(20) % 3 == 0
    real = torch.arange(20) > 1
    scores = query @ key.repeat_interleave(4, 0).transpose(1, 2) / 4
    read = (torch.arange(20) <= columns[:, None]) & real
    weights = scores.double().masked_fill(~read, -torch.inf).softmax(-1)
    on_visual, on_others = visual_mass(query, key, columns, visual, real, 0.25, block)
    torch.testing.assert_close(on_visual.double(), weights[..., visual].sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(on_others.double(), weights[..., ~visual].sum(-1), rtol=1e-5, atol=1e-6)


def test_changes_and_neurons_are_those_of_the_layers():
    model = make_model()
    sample = make_sample(model)
    result = calibrate(model, [sample])
    visual = sample["input_ids"][0] == model.config.image_token_id
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    layer = model.model.language_model.layers[1]
    handles = [part.register_forward_hook(keep(name)) for name, part in layer.named_modules() if name]
    with torch.no_grad():
        states = model(**{k: v for k, v in sample.items() if k != "labels"}, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    before = states[1][0][visual]
    middle = before + seen["self_attn"][0][visual]
    for name, start, end in (("attention", before, middle), ("ffn", middle, states[2][0][visual])):
        cosine = torch.cosine_similarity(start, end, dim=-1).mean()
        size = ((end - start).norm(dim=-1) / start.norm(dim=-1)).mean()
        np.testing.assert_allclose(getattr(result, f"{name}_change")[1], [cosine, size], rtol=1e-5)
    inner = seen["mlp.act_fn"] * seen["mlp.up_proj"]
    importance = inner[0][visual].abs().mean(0) * layer.mlp.down_proj.weight.norm(dim=0)
    assert result.neurons.shape == (LAYERS, NEURONS)
    np.testing.assert_allclose(result.neurons[1], importance.detach(), rtol=1e-5)


def test_sensitivity_is_the_divergence_of_one_reduced_layer():
    model = make_model()
    samples = make_samples(model, 2)
    result = calibrate(model, samples, sensitivity=True)
    assert result.sensitivity.shape == (LAYERS, 3)
    probes = [Probe(Target.of(model), [sample]) for sample in samples]
    dense = VisualPlan.dense(LAYERS)
    for column, layer in enumerate((LayerPlan.off(), LayerPlan(attention=Neighborhood(2)), LayerPlan(ffn=0.0))):
        for index in range(LAYERS):
            measured = np.mean([probe.divergence(with_layer(dense, index, layer)) for probe in probes])
            np.testing.assert_allclose(result.sensitivity[index, column], measured, rtol=1e-5, atol=1e-8)
    assert result.sensitivity[0, 0] > 0 and result.sensitivity[-1, 2] == 0  # the last layer's rows are read by nobody


@pytest.mark.parametrize(("scores", "most"), [("mass", 1.05), ("effects", 1.5)])
def test_flops_of_the_default_pass(scores, most):
    """Of a decoder much larger than the tower, with answers short beside the image, as real ones are."""
    model = make_model(dtype=torch.float32, hidden_size=128, intermediate_size=384)
    samples = [make_sample(model, (3, *[IMAGE] * 9, 4), seed=index) for index in range(25)]
    with FlopCounterMode(display=False) as dense, torch.no_grad():
        for sample in samples:
            model.model(**{name: value for name, value in sample.items() if name != "labels"}, use_cache=False)
    with FlopCounterMode(display=False) as counted:
        calibrate(model, samples, scores=scores)
    assert dense.get_total_flops() < counted.get_total_flops() < most * dense.get_total_flops()


def test_effects_are_of_samples_that_keep_step_with_no_period():
    chosen = np.array([has_effects(index) for index in range(1000)])
    for first in (8, 16, 256, 1000):
        assert chosen[0] and chosen[:first].sum() == pytest.approx(first / 8, abs=1)
    for period in (2, 3, 4, 5, 7, 8):
        np.testing.assert_allclose([chosen[start::period].mean() for start in range(period)], 0.125, atol=0.05)


def test_effects_are_means_over_the_samples_they_are_measured_on():
    model = make_model()
    samples = make_samples(model, 9)
    chosen = [sample for index, sample in enumerate(samples) if has_effects(index)]
    assert 1 < len(chosen) < len(samples)
    single = [calibrate(model, [sample]).effects for sample in chosen]
    np.testing.assert_allclose(calibrate(model, samples).effects, np.mean(single, axis=0), rtol=1e-5)


def test_peak_memory_is_far_below_that_of_attention_matrices():
    """2,880 visual tokens, the most that LLaVA-NeXT has."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    model = from_text_config(config, dtype=torch.float32, image_size=28, patch_size=7)
    sample = make_sample(model, (3, *[IMAGE] * 180, 4))
    inputs = {name: value for name, value in sample.items() if name != "labels"}
    with PeakBytes() as ours:
        calibrate(model, [sample])
    model.set_attn_implementation("eager")
    with PeakBytes() as theirs, torch.no_grad():
        model(**inputs, output_attentions=True, use_cache=False)
    assert ours.peak < theirs.peak / 5


def test_the_model_is_left_as_it_was():
    model = make_model()
    sample = make_sample(model)
    inputs = {k: v for k, v in sample.items() if k != "labels"}
    before = model(**inputs).logits
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    calibrate(model, [sample])
    with pytest.raises(SampleError):
        calibrate(model, [sample, make_sample(model, (5,), 2) | {"pixel_values": None}])
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert torch.equal(model(**inputs).logits, before)


def test_a_sample_without_an_answer_gets_the_models_own():
    model = make_model()
    prompt = make_sample(model, answer=0)
    given = answered(model, prompt, 3)
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=3)
    assert torch.equal(given["input_ids"], tokens)
    assert torch.equal(given["labels"][0, -3:], tokens[0, -3:])
    assert answer_rows(given).tolist() == list(range(tokens.shape[1] - 4, tokens.shape[1] - 1))
    np.testing.assert_array_equal(calibrate(model, [prompt], max_new_tokens=3).ratios, calibrate(model, [given]).ratios)


def test_votes_are_of_samples_and_the_majority_decides():
    ratios = np.array([[[0.3, 0.1, 0.2]] * 3, [[0.3, 0.1, 0.0]] * 3, [[0.0, 0.3, 0.2]] * 3], dtype=np.float32)
    model = make_model()
    result = calibrate(model, make_samples(model))
    result = Calibration(**{**vars(result), "ratios": ratios})
    assert result.votes(0.2).tolist() == (ratios > 0.2).tolist()
    assert result.elected(0.2).tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    assert result.elected(0.15, whole=()).tolist() == [[True, False, True]] * 3


def test_the_file_is_what_patch_takes_for_head_scores(tmp_path):
    model = make_model()
    result = calibrate(model, make_samples(model), out=tmp_path / "a.safetensors", data="random")
    loaded = Calibration.load(tmp_path / "a.safetensors")
    for name in ("heads", "ratios", "text_mass", "attention_change", "ffn_change", "neurons"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(result, name))
    assert loaded.metadata == result.metadata and loaded.metadata["data"] == "random"
    np.testing.assert_array_equal(load_heads(tmp_path / "a.safetensors"), result.heads)
    assert result.heads.shape == (LAYERS, HEADS) and result.heads.dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_another_file_is_refused(tmp_path):
    save_file({"heads": np.ones((2, 4), np.float32)}, tmp_path / "heads.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("heads.safetensors", "text.safetensors", "none.safetensors"):
        with pytest.raises(PlanError, match=f"calibration: .*{name}: expected a file that calibrate wrote"):
            Calibration.load(tmp_path / name)


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


def launch(*arguments, launcher=("-m",)):
    command = [sys.executable, *launcher, "tests.launched", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)


def test_a_killed_run_goes_on_to_the_same_file(tmp_path):
    assert launch("calibrate", tmp_path / "a.safetensors", 3).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors.partial"]
    for name in ("a.safetensors", "b.safetensors"):
        assert launch("calibrate", tmp_path / name).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


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


def write_image(path):
    Image.new("RGB", (8, 8), (200, 0, 0)).save(path)


def test_records_of_a_jsonl_file(tmp_path):
    write_image(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "what?", "answer": "red"}, {"image": "a.png", "question": "why?"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_records(tmp_path / "data.jsonl")
    assert (first.image, first.question, first.answer) == (tmp_path / "a.png", "what?", "red")
    assert second.answer is None
    assert len(records(str(tmp_path / "data.jsonl"), 1, None)) == 1
    with pytest.raises(SampleError, match="samples: got 3, expected at most the 2"):
        records(str(tmp_path / "data.jsonl"), 3, None)


def test_records_of_a_parquet_file(tmp_path):
    """Images as bytes in the file, and as paths beside it."""
    write_image(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "b.png")
    images = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, {"bytes": None, "path": "images/b.png"}]
    table = pyarrow.table({"image": images, "question": ["what?", "why?"], "answer": ["red", None]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    first, second = records(str(tmp_path / "data.parquet"), 2, None)
    assert (first.image.size, first.image.getpixel((0, 0)), first.answer) == ((8, 8), (200, 0, 0), "red")
    assert (second.image, second.question, second.answer) == (tmp_path / "images/b.png", "why?", None)


def test_records_of_lmms_evals_tasks(tmp_path, monkeypatch):
    """A group's tasks come in turn: place, count, exists, as the tiny data says them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    found = records("lmms:digit_grid", 6, None)
    expected = [questions(kind, 2)[index] for index in range(2) for kind in ("place", "count", "exists")]
    assert {(r.question, r.answer, r.image.tobytes()) for r in found} == {
        (question.text, question.answer, question.image.tobytes()) for question in expected
    }
    assert len({record.question.split()[0] for record in found[:3]}) == 3
    with pytest.raises(SampleError, match="tasks: got nothing_such, expected tasks of lmms-eval"):
        records("lmms:nothing_such", 1, None)


def test_records_of_a_folder_come_by_name(tmp_path):
    for name in ("b.png", "a.jpg", "c.txt"):
        write_image(tmp_path / "x.png")
        (tmp_path / "x.png").rename(tmp_path / name)
    found = [(record.image.name, record.question) for record in read_records(tmp_path, "what?")]
    assert found == [("a.jpg", "what?"), ("b.png", "what?")]
    with pytest.raises(SampleError, match="prompt: got none"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 1: expected a JSON object"),
        ('{"question": "what?"}', "row 1: expected image and question"),
        ('{"image": "a.png", "question": "what?"}', "row 1: image: got .*a.png', expected an existing file"),
        ("[]", "row 1: expected image and question"),
    ],
)
def test_broken_data_is_refused_by_row(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(SampleError, match=message):
        list(read_records(tmp_path / "data.jsonl"))


def test_unknown_data_is_refused(tmp_path):
    with pytest.raises(
        SampleError, match="expected a .jsonl or .parquet file, an image folder, lmms:TASK, or tiny-train"
    ):
        records("tiny-test", 4, None)
    with pytest.raises(SampleError, match="expected an image folder or a .jsonl or .parquet file"):
        read_records(tmp_path / "data.csv")


SCORES = np.array([[0.1, 0.45, 0.2, 0.3], [0.9, 0.8, 0.1, 0.7], [0.0, 0.05, 0.6, 0.5]], dtype=np.float32)


def kept(masks):
    return [[index for index, active in enumerate(mask) if active] for mask in masks]


@pytest.mark.parametrize(
    ("budget", "kv_heads", "expected"),
    [
        (HeadBudget(0.5), 4, [[1, 3], [0, 1], [2, 3]]),
        (HeadBudget(0.5, over="model"), 4, [[1], [0, 1, 3], [2, 3]]),
        (HeadBudget(1, over="model"), 4, [[], [0, 1, 3], []]),
        (HeadBudget(0.5, by="group"), 2, [[0, 1], [0, 1], [2, 3]]),
        (HeadBudget(2, by="group", over="model"), 2, [[], [0, 1, 2, 3], [2, 3]]),
    ],
)
def test_budgets_keep_the_best_scores(budget, kv_heads, expected):
    assert kept(keep_heads(SCORES, budget, kv_heads)) == expected


def test_a_plan_with_budgets_is_resolved_from_a_calibration(tmp_path):
    model = make_model()
    result = calibrate(model, make_samples(model), out=tmp_path / "a.safetensors")
    budgets = VisualPlan((LayerPlan(), LayerPlan(heads=HeadBudget(3), ffn=NeuronBudget(0.25)), LayerPlan(ffn=0.5)))
    heads = np.sort(np.argsort(-result.heads[1])[:3]).tolist()
    neurons = tuple(np.sort(np.argsort(-result.neurons[1])[: NEURONS // 4]).tolist())
    for calibration in (result, tmp_path / "a.safetensors"):
        with vis_sparse.patched(model, budgets, calibration=calibration):
            layers = vis_sparse.inspect(model)["plan"].layers
        assert kept([layers[1].heads]) == [heads]
        assert [layer.ffn for layer in layers] == [1.0, neurons, 0.5]
    assert VisualPlan.from_yaml(budgets.to_yaml()) == budgets
    with pytest.raises(PlanError, match="layer 1: ffn: got the budget {keep: 0.25} and no neuron importance"):
        vis_sparse.patch(model, budgets, heads=result.heads)
    with pytest.raises(PlanError, match="calibration: got 3 layers, expected 2"):
        resolve_heads(VisualPlan((LayerPlan(ffn=NeuronBudget(1)),) * 2), HEADS, HEADS, "first", result)


def test_first_neurons_stand_in_for_counting():
    plan = VisualPlan((LayerPlan(ffn=NeuronBudget(0.25)), LayerPlan(ffn=NeuronBudget(3))))
    assert [layer.ffn for layer in resolve_heads(plan, HEADS, HEADS, "first").layers] == [0.25, (0, 1, 2)]
    with pytest.raises(PlanError, match=r"ffn.keep: got 49, expected at most the model's 48 neurons"):
        VisualPlan((LayerPlan(ffn=NeuronBudget(49)),)).check_fits(1, HEADS, NEURONS)
    with pytest.raises(PlanError, match="expected neurons"):
        plan.layers[0].neurons(NEURONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{heads: {keep: 2, by: pair}}", "heads.by: got 'pair', expected head or group"),
        ("{heads: {keep: 2, over: all}}", "heads.over: got 'all', expected layer or model"),
        ("{ffn: {keep: 1.5}}", "ffn.keep: got 1.5"),
        ("{ffn: {file: a}}", "layers 0: ffn: got unknown key 'file'"),
        ("{ffn: {}}", "layers 0: ffn: keep is missing"),
    ],
)
def test_malformed_budgets_are_refused(text, message):
    with pytest.raises(PlanError, match=message):
        VisualPlan.from_yaml(f"layers: {{0: {text}}}\n", 1)


def test_masks_in_the_official_format(tmp_path):
    model = make_model()
    result = calibrate(model, make_samples(model))
    masks = result.masks(0.25)
    assert masks[:2].all() and masks[2].sum() == HEADS // 4
    np.save(tmp_path / "heads.npy", masks)
    plan = resolve_heads(VisualPlan.dense(LAYERS), HEADS, HEADS, tmp_path / "heads.npy")
    assert [layer.heads for layer in plan.layers] == [tuple(mask) for mask in masks.tolist()]
    assert result.masks(2, over="layer", whole=()).sum(1).tolist() == [2] * LAYERS
