"""The parts of a layer's weights that visual rows need: K and V where only keys are written, and the FFN's neurons.

Taken after the weights were loaded and before the engine packs them (on CPUs vLLM keeps a packed form alone), and each
shard takes what it holds of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shards:
    """Which part of the weights this worker holds. reduce: the sum of a tensor over all of them."""

    rank: int = 0
    number: int = 1
    reduce: Callable = torch.Tensor.clone


class CutLinear(nn.Module):
    """A product with some rows or columns of a loaded weight. pack: what the engine does to weights of products."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, pack: Callable | None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.cpu_linear = None
        self.bytes = self.weight.nbytes  # before packing, which keeps as many elsewhere
        if pack is not None and self.weight.numel():
            pack(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cpu_linear is not None:
            return self.cpu_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class VisualKeys(nn.Module):
    """K and V of rows that are no queries, from a layer's input."""

    def __init__(self, attention: nn.Module, pack: Callable | None):
        super().__init__()
        projection, width = attention.qkv_proj, attention.q_size
        bias = None if projection.bias is None else projection.bias[width:]
        self.project = CutLinear(projection.weight[width:], bias, pack)
        self.rotary = attention.rotary_emb
        self.width, self.head_dim = attention.kv_size, attention.head_dim

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.project(x).split([self.width, self.width], dim=-1)
        # the engine's rotary embedding takes a query and may work in place: a copy of one head stands in for it
        # (contiguous() copies nothing of a single row)
        _, key = self.rotary(positions, key[:, : self.head_dim].clone(), key.contiguous())
        return key.view(-1, self.width // self.head_dim, self.head_dim), value.reshape(
            -1, self.width // self.head_dim, self.head_dim
        )


class VisualFFN(nn.Module):
    """The FFN on some of its neurons, a count of first ones or indices, summed over shards."""

    def __init__(
        self, ffn: nn.Module, neurons: int | tuple[int, ...], size: int, shards: Shards, pack: Callable | None
    ):
        super().__init__()
        gate_up, down = ffn.gate_up_proj, ffn.down_proj
        mine = shard_neurons(neurons, size, shards)
        index = torch.from_numpy(mine).to(gate_up.weight.device)
        both = torch.cat([index, index + size // shards.number])
        bias = None if gate_up.bias is None else gate_up.bias[both]
        self.up = CutLinear(gate_up.weight[both], bias, pack)
        self.act = ffn.act_fn
        self.down = CutLinear(down.weight[:, index], down.bias if shards.rank == 0 else None, pack)
        self.neurons, self.reduce = len(mine), shards.reduce if shards.number > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.neurons:
            out = self.down(self.act(self.up(x)))
        else:
            out = torch.zeros_like(x) if self.down.bias is None else self.down.bias.expand_as(x)
        return out if self.reduce is None else self.reduce(out)


def shard_neurons(neurons: int | tuple[int, ...], size: int, shards: Shards) -> np.ndarray:
    """int64 indices, within its shard, of those of `neurons` that a worker holds."""
    chosen = np.arange(neurons) if isinstance(neurons, int) else np.array(neurons, np.int64)
    held = size // shards.number
    first = shards.rank * held
    return chosen[(chosen >= first) & (chosen < first + held)] - first
