"""How much an answer depends on visual tokens in each head: one backward pass through gates.

The attention of a head is its dense output times a gate, plus what it would be without visual tokens (nothing at
visual rows, attention to text alone at text rows) times the rest. At gate 1 this is the dense model; the derivative
of the answer's log-odds by the gate says how the answer moves when visual tokens begin to leave the head. Log-odds,
because the log-probability of an answer that the model is sure of hardly moves at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention_mass import replaced_attention
from .profiles import Target, arguments_of, column_kinds
from .samples import answer_rows


def head_effects(target: Target, sample: dict) -> torch.Tensor:
    """(layers, heads) float64 on the CPU: |derivative of the answer's log-odds by a head's gate|.

    The log-odds of the dense model's own likeliest token, summed over the rows that predict the answer.
    """
    is_visual, is_real = column_kinds(target.layout(sample), sample)
    text = (~is_visual & is_real).nonzero()[:, 0]
    decoder = target.decoder
    gates = torch.ones(len(decoder.layers), decoder.num_heads, device=is_visual.device, requires_grad=True)
    layers = iter(gates)

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        dense, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        q, k, v = (tensor.index_select(2, text) for tensor in (query, key, value))
        alone = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
        without = torch.zeros_like(dense).index_copy(1, text, alone)
        return torch.lerp(without, dense, next(layers).to(dense.dtype)[:, None]), None

    with _frozen(target.model), torch.enable_grad(), replaced_attention(target.text_model, attention):
        hidden = target.outer(**arguments_of(sample), use_cache=False).last_hidden_state[0]
        logits = target.model.get_output_embeddings()(hidden[answer_rows(sample)]).float()
        best = logits.argmax(-1, keepdim=True)
        others = logits.scatter(-1, best, -torch.inf).logsumexp(-1)
        log_odds = logits.gather(-1, best)[:, 0] - others
        (gradient,) = torch.autograd.grad(log_odds.sum(), gates)
    return gradient.abs().double().cpu()


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
