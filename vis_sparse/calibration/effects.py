"""How much an answer depends on visual tokens in each head: derivatives by gates, one layer after the other.

The attention of a head is its dense output times a gate, plus what it would be without visual tokens (nothing at
visual rows, attention to text alone at text rows) times the rest. At gate 1 this is the dense model; the derivative
of the answer's log-odds by the gate says how the answer moves when visual tokens begin to leave the head. Log-odds,
because the log-probability of an answer that the model is sure of hardly moves at all.

Of the dense pass only the layers' inputs are kept; on the way back each layer runs once more, with gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention_mass import replaced_attention
from .profiles import Target, column_kinds
from .samples import answer_rows


@contextmanager
def recorded_calls(target: Target) -> Iterator[list[tuple[tuple, dict]]]:
    """Within the block, (arguments, keywords) of every call of a decoder layer and of the final norm, in order."""
    calls = []
    modules = [*target.text_model.layers, target.decoder.norm]
    handles = [
        module.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
        for module in modules
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def head_effects(target: Target, sample: dict, calls: list[tuple[tuple, dict]]) -> torch.Tensor:
    """(layers, heads) float64 on the CPU: |derivative of the answer's log-odds by a head's gate|.

    The log-odds of the dense model's own likeliest token, summed over the rows that predict the answer. calls:
    `recorded_calls` of the dense pass over the sample.
    """
    is_visual, is_real = column_kinds(target.layout(sample), sample)
    text = (~is_visual & is_real).nonzero()[:, 0]
    *layers, ((hidden, *_), _) = calls

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        dense, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        q, k, v = (tensor.index_select(2, text) for tensor in (query, key, value))
        alone = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
        without = torch.zeros_like(dense).index_copy(1, text, alone)
        return torch.lerp(without, dense, gate.to(dense.dtype)[:, None]), None

    with _frozen(target.model), torch.enable_grad(), replaced_attention(target.text_model, attention):
        hidden = hidden.detach().requires_grad_()
        _log_odds(target, hidden[0, answer_rows(sample)]).backward()
        effects = []
        for module, ((before, *others), named) in zip(reversed(target.text_model.layers), reversed(layers)):
            slope, hidden = hidden.grad, before.detach().requires_grad_()
            gate = torch.ones(target.decoder.num_heads, device=text.device, requires_grad=True)
            module(hidden, *others, **named).backward(slope)
            effects.append(gate.grad)
    return torch.stack(effects[::-1]).abs().double().cpu()


def _log_odds(target: Target, hidden: torch.Tensor) -> torch.Tensor:
    """Sum of the likeliest tokens' log-odds from the final norm's input at the answer's rows."""
    logits = target.model.get_output_embeddings()(target.decoder.norm(hidden)).float()
    best = logits.argmax(-1, keepdim=True)
    others = logits.scatter(-1, best, -torch.inf).logsumexp(-1)
    return (logits.gather(-1, best)[:, 0] - others).sum()


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
