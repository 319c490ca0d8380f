"""What a GPU does in one launch around a layer's products: counted and computed here by the kernels' torch forms."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import vis_sparse
from vis_sparse.eval.launches import Launches
from vis_sparse.executor import bound
from vis_sparse.kernels import fused

from ..marks import slow_but
from ..models import IMAGE, VOCAB, deep_model, extended, from_text_config, make_batch, run
from ..patches.text_models import text_config

LAYERS = 8


@pytest.fixture
def launched(monkeypatch) -> Counter:
    """How often each of the operations ran, of which nothing else is counted."""
    counts: Counter = Counter()

    def at_once(name: str):
        def call(*args, **kwargs):
            counts[name] += 1
            with _disable_current_modes():
                return getattr(fused, name)(*args, **kwargs)

        return call

    names = ("rms_norm", "rotate", "rotate_into", "silu_mul")
    kernels = SimpleNamespace(**{name: at_once(name) for name in names})
    monkeypatch.setattr(bound, "fused_operations", lambda weight: kernels)
    return counts


def decode_step(model, batch):
    cache = run(model, batch)[1]
    longer = extended(model, batch, 2)
    run(model, longer, [batch.length + 1], cache=cache, start=batch.length)
    call = {"input_ids": longer.input_ids[:, -1:], "past_key_values": cache}
    return lambda: model(**call).logits


def count(call) -> int:
    with Launches() as counted:
        call()
    return counted.totals()[0]


@pytest.mark.parametrize("plan", slow_but(["dense", "yopo-12"], vis_sparse.plan_names()))
@torch.no_grad()
def test_a_decode_step_launches_at_most_seven_tenths(plan, launched, record_property):
    model = deep_model(LAYERS, torch.float32)
    batch = make_batch(model, [(5, IMAGE, 4)])
    unpatched = count(decode_step(model, batch))
    step = decode_step(vis_sparse.patch(model, plan, heads="first"), batch)
    launched.clear()
    found = count(step) + launched.total()
    record_property("launches", {"patched": found, "unpatched": unpatched})
    assert found <= 0.7 * unpatched and launched.total() >= 3 * LAYERS, (found, unpatched, launched)


@pytest.mark.parametrize("kind, plan", [("llama", "yopo-12"), ("qwen3", "vica"), ("qwen3", "dense")])
@torch.no_grad()
def test_logits_are_those_of_single_operations(kind, plan, launched, monkeypatch):
    """Heads that are normed too (Qwen3)."""
    config = text_config(kind, num_hidden_layers=LAYERS, vocab_size=VOCAB, hidden_size=32)
    model = from_text_config(config, dtype=torch.float32)
    batch = make_batch(model, [(5, IMAGE, 4), (2, IMAGE, 3)], "right")
    longer = extended(model, batch, 2)
    given = run(vis_sparse.patch(model, plan, heads="first"), longer, [batch.length, batch.length + 1])[0]
    assert launched["rms_norm"] and launched["rotate_into"] and launched["silu_mul"]
    monkeypatch.undo()
    vis_sparse.unpatch(model)
    expected = run(vis_sparse.patch(model, plan, heads="first"), longer, [batch.length, batch.length + 1])[0]
    real = longer.attention_mask.bool()
    torch.testing.assert_close(given[real], expected[real], atol=2e-5, rtol=2e-5)
