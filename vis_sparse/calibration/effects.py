"""How much an answer depends on visual tokens in each head: derivatives by gates, one layer after the other.

The attention of a head is its dense output times a gate, plus what it would be without visual tokens (nothing at
visual rows, attention to text alone at text rows) times the rest. The derivative of the answer's log-probability by a
gate says how the answer moves with the visual tokens in that head. It is taken with all gates half closed: at 1, the
dense model, heads do each other's work, a head whose work others do looks idle, and an answer that the model is sure of
hardly moves at all.

Of the forward pass only the layers' inputs are kept; on the way back each layer runs once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention_mass import replaced_attention
from .profiles import Target, column_kinds
from .samples import answer_rows

_GATE = 0.5


@contextmanager
def recorded_calls(*modules: nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """Within the block, (arguments, keywords) of every call of the modules, in order."""
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
        for module in modules
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def head_effects(target: Target, sample: dict, call: tuple[tuple, dict]) -> torch.Tensor:
    """(layers, heads) float64 on the CPU: squared derivatives of the answer's log-probability by the gates, over their
    sum: every sample counts as much, however sure its answer is.

    call: of the text model in the dense pass over the sample.
    """
    is_visual, is_real = column_kinds(target.layout(sample), sample)
    text = (~is_visual & is_real).nonzero()[:, 0]
    layers = target.text_model.layers
    gates = torch.full((len(layers), target.decoder.num_heads), _GATE, device=text.device, requires_grad=True)

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        dense, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        q, k, v = (tensor.index_select(2, text) for tensor in (query, key, value))
        alone = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        alone = rearrange(alone, "batch head row dim -> batch row head dim")
        without = torch.zeros_like(dense).index_copy(1, text, alone)
        return torch.lerp(without, dense, gates[module.layer_idx].to(dense.dtype)[:, None]), None

    with _frozen(target.model), replaced_attention(target.text_model, attention):
        with recorded_calls(*layers, target.decoder.norm) as calls, torch.no_grad():
            target.text_model(*call[0], **call[1])
        *calls, ((hidden, *_), _) = calls
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            _log_probability(target, hidden, sample).backward()
            for layer, ((before, *others), named) in zip(reversed(layers), reversed(calls)):
                slope, hidden = hidden.grad, before.detach().requires_grad_()
                layer(hidden, *others, **named).backward(slope)
    squares = gates.grad.double().square().cpu()
    return squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)


def _log_probability(target: Target, hidden: torch.Tensor, sample: dict) -> torch.Tensor:
    """Of the answer's tokens together, from the final norm's input."""
    rows = answer_rows(sample)
    logits = target.model.get_output_embeddings()(target.decoder.norm(hidden[0, rows])).float()
    return -F.cross_entropy(logits, sample["labels"][0, rows + 1], reduction="sum")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block, no parameter asks for a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
