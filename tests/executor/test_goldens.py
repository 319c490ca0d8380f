"""Number for number against the official YOPO code: the oracle first, then the executor."""

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig

import vis_sparse
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.plans.plan import VisualPlan

from .. import goldens, oracle
from ..models import from_text_config

GRID = (1, 24, 24)


@dataclass
class Golden:
    model: torch.nn.Module
    plan: VisualPlan
    layout: VisualLayout
    embeds: torch.Tensor
    rows: torch.Tensor
    hidden_states: torch.Tensor
    prefill: torch.Tensor
    dense: torch.Tensor
    tokens: torch.Tensor
    decode: torch.Tensor


@pytest.fixture(scope="module", params=goldens.YOPO)
def golden(request):
    setting, random, results = goldens.load(f"yopo/{request.param}")
    config = {key: setting[key] for key in LlamaConfig().to_dict().keys() & setting.keys() - {"dtype"}}
    config = LlamaConfig(**config, rope_parameters={"rope_type": "default", "rope_theta": setting["rope_theta"]})
    # no token of the vocabulary stands for an image: the golden data has images as embeddings
    model = from_text_config(config, dtype=torch.float32, image_size=48, patch_size=2, image_token=config.vocab_size)
    weights = {name[2:]: torch.from_numpy(tensor) for name, tensor in random.items() if name.startswith("w/")}
    head = weights.pop("lm_head.weight")
    model.lm_head.load_state_dict({"weight": head})
    model.model.language_model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    names = ("logits_rows", "hidden_states", "prefill_logits", "dense_causal_prefill_logits")
    return Golden(
        model,
        VisualPlan.yopo(
            setting["num_hidden_layers"],
            setting["attncut_w"],
            setting["layercut_num"],
            results["headmask"],
            setting["mlpcut_ratio"],
            semantics="zero",
        ),
        VisualLayout.from_grids([[(setting["sprompt_len"], GRID)]] * setting["batch"]),
        torch.from_numpy(random["inputs_embeds"]),
        *(torch.from_numpy(results[name]) for name in (*names, "decode_tokens", "decode_logits")),
    )


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual.to(expected), expected, rtol=0, atol=atol)


@torch.no_grad()
def test_oracle(golden):
    """Prefill and decode come from one pass: later text changes no earlier row."""
    model, prompt = golden.model, golden.embeds.shape[1]
    whole = torch.cat([golden.embeds, model.get_input_embeddings()(golden.tokens)], dim=1)
    states = oracle.hidden_states(model.model.language_model, golden.plan, golden.layout, whole)
    close(torch.stack(states)[:, :, golden.rows], golden.hidden_states, 3e-5)
    logits = states[-1] @ model.lm_head.weight.double().T
    close(logits[:, golden.rows], golden.prefill, 3e-5)
    close(logits[:, prompt:], golden.decode, 3e-5)


@torch.no_grad()
def test_oracle_dense(golden):
    plan = VisualPlan.dense(golden.plan.num_layers)
    logits = oracle.logits(golden.model, plan, golden.layout, golden.embeds)
    close(logits[:, golden.rows], golden.dense, 3e-5)


@pytest.fixture(params=["reference", "torch"])
def backend(request):
    return request.param


@torch.no_grad()
def test_executor_prefill(golden, backend):
    model = golden.model
    with vis_sparse.patched(model, golden.plan, backend=backend), vis_sparse.use_layout(model, golden.layout):
        out = model(inputs_embeds=golden.embeds, output_hidden_states=True)
        last = model.model(inputs_embeds=golden.embeds).last_hidden_state
    close(out.logits[:, golden.rows], golden.prefill, 1e-4)
    close(torch.stack(out.hidden_states)[:, :, golden.rows], golden.hidden_states, 1e-4)
    close(last[:, golden.rows], golden.hidden_states[-1], 1e-4)


@torch.no_grad()
def test_executor_decode(golden, backend):
    with vis_sparse.patched(golden.model, golden.plan, backend=backend) as model:
        with vis_sparse.use_layout(model, golden.layout):
            cache = model(inputs_embeds=golden.embeds, use_cache=True).past_key_values
        for step, token in enumerate(golden.tokens.T):
            out = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
            close(out.logits[:, -1], golden.decode[:, step], 1e-4)
            if step + 1 < golden.tokens.shape[1]:
                assert torch.equal(out.logits[:, -1].argmax(-1), golden.tokens[:, step + 1])


@torch.no_grad()
def test_executor_dense(golden, backend):
    model, dense = golden.model, VisualPlan.dense(golden.plan.num_layers)
    with vis_sparse.patched(model, dense, backend=backend), vis_sparse.use_layout(model, golden.layout):
        close(model(inputs_embeds=golden.embeds).logits[:, golden.rows], golden.dense, 1e-4)
