"""What the executor knows of a model's decoder; families are unknown here and hand it over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .transformers_internals import keeps_no_activations


@dataclass(frozen=True)
class DecoderLayer:
    """Where the modules of one decoder layer (pre-norm, gated FFN) are.

    parts: for each of input_norm, query, key, value, output, post_norm, gate, up, down and activation, and of
    query_norm and key_norm (over a head's width) where the layer has them, the module that holds it and the name
    there: adapters put other modules in these places. scale: of the attention scores. fused: for parts that share
    one linear layer, which of its outputs are theirs. norms: for norms that compute what `torch.rms_norm` does, their
    class and the name of their epsilon.
    """

    parts: dict[str, tuple[nn.Module, str]]
    scale: float
    fused: dict[str, range] = field(default_factory=dict)
    norms: dict[str, tuple[type, str]] = field(default_factory=dict)

    @property
    def checkpoints(self) -> bool:
        """Whether the layer keeps no activations and is run again in the backward pass (no cache then)."""
        block, _ = self.parts["input_norm"]
        return keeps_no_activations(block)

    def module(self, part: str) -> nn.Module:
        owner, name = self.parts[part]
        module = owner._modules.get(name)  # many times quicker than the attribute
        return getattr(owner, name) if module is None else module

    def outputs(self, part: str, indices: Sequence[int]) -> tuple[int, ...]:
        """Outputs `indices` of a part as outputs of its linear layer."""
        own = self.fused.get(part)
        return tuple(indices) if own is None else tuple(own[i] for i in indices)


@dataclass(frozen=True)
class Decoder:
    """A text model's decoder and its sizes.

    rotary(hidden, position_ids) gives cos and sin, (batch or 1, length, head_dim).
    """

    layers: tuple[DecoderLayer, ...]
    norm: nn.Module
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
