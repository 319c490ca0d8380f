"""What calibration measures: against full attention matrices, slopes, and the layers themselves; what it costs."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from vis_sparse.calibration.attention_mass import visual_mass
from vis_sparse.calibration.measure import calibrate, has_effects
from vis_sparse.calibration.probe import Probe
from vis_sparse.calibration.profiles import Target
from vis_sparse.calibration.records import SampleError
from vis_sparse.calibration.samples import answer_rows
from vis_sparse.eval.memory import PeakBytes
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood
from vis_sparse.plans.plan import VisualPlan, with_layer

from .. import oracle
from ..models import HEADS, IMAGE, LAYERS, NEURONS, from_text_config, make_model, text_inputs
from .samples import make_sample, make_samples


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
