"""The float64 oracle of a plan's tower section: dense masks over all rows of an encoder's call. Written for reading.

It shares no code with the executor: places come from transformers, weights from the layers, masks from DESIGN.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood


@dataclass(frozen=True)
class Places:
    """(rows,) each: the part that a row attends within, its place there (-1: a global token), and the last place."""

    part: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor

    @property
    def is_patch(self) -> torch.Tensor:
        return self.y >= 0

    def last(self, place: torch.Tensor) -> torch.Tensor:
        return torch.stack([place[self.part == part].max() for part in self.part])

    def first(self, place: torch.Tensor) -> torch.Tensor:
        return torch.stack([place[(self.part == part) & self.is_patch].min() for part in self.part])


def read_by(plan: LayerPlan, places: Places, heads: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """(head, query, key): what enters each query's softmax."""
    same = places.part[:, None] == places.part[None]
    patch = places.is_patch
    near = same.clone()
    if isinstance(plan.attention, Neighborhood):
        for place in (places.y, places.x):
            start = places.first(place)
            own, stride = place - start, plan.attention.stride
            low = own // stride * stride
            high = torch.minimum(low + stride - 1, places.last(place) - start)
            near &= (own[None] >= (low - plan.attention.radius)[:, None]) & (
                own[None] <= (high + plan.attention.radius)[:, None]
            )
    both = patch[:, None] & patch[None]
    keys = torch.where(both, near, same) & alive[None]
    active = keys[None] & heads[:, None, None]
    of_globals = keys & ~patch[:, None] & ~patch[None]
    return active | of_globals[None]


def attention(block, names, plan: LayerPlan, h, places: Places, alive, rotary) -> torch.Tensor:
    module = names.attention(block)
    value, weights = weighted(block, names, plan, h, places, alive, rotary)
    return names.output(module)(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))


def weighted(block, names, plan: LayerPlan, h, places: Places, alive, rotary) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (rows, heads, head_dim), and the weights that each query gives each key, (heads, query, key)."""
    module = names.attention(block)
    count, width = module.num_heads, module.head_dim
    heads = torch.ones(count, dtype=torch.bool) if plan.heads is None else torch.tensor(plan.heads)
    query, key, value = names.projected(module, h)
    query, key, value = (t.view(len(h), count, width) for t in (query, key, value))
    if rotary is not None:
        cos, sin = (t.to(h)[:, None] for t in rotary)
        query, key = (
            t * cos + torch.cat([-t[..., width // 2 :], t[..., : width // 2]], -1) * sin for t in (query, key)
        )
    allowed = read_by(plan, places, heads, alive)
    scores = torch.einsum("qhd,khd->hqk", query, key) * width**-0.5
    return value, scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)  # a patch in an inactive head


def received(block, names, x, places: Places, alive, rotary) -> torch.Tensor:
    """(rows,) what each row gets in a whole layer of the attention of its part's global tokens, or else of its part's
    rows, the mean."""
    _, weights = weighted(block, names, LayerPlan(), names.norms(block)[0](x), places, alive, rotary)
    found = torch.zeros(len(x), dtype=x.dtype)
    for part in places.part.unique():
        own = (places.part == part) & alive
        asking = own & ~places.is_patch if (~places.is_patch).any() else own
        found[own] = weights.mean(0)[asking][:, own].mean(0)
    return found


def feed_forward(block, names, plan: LayerPlan, h, is_patch) -> torch.Tensor:
    gate, up, down, activation = names.ffn(block)

    def inner(x):
        return activation(up(x)) if gate is None else activation(gate(x)) * up(x)

    used = torch.zeros(up.out_features, dtype=torch.bool)
    used[list(plan.ffn) if isinstance(plan.ffn, tuple) else slice(int(up.out_features * plan.ffn + 1e-6))] = True
    whole = inner(h)
    neurons = torch.where(is_patch[:, None] & ~used, 0.0, whole)
    out = linear(neurons, down.weight, down.bias)
    return out if used.any() else torch.where(is_patch[:, None], 0.0, out)


def layer(block, names, plan: LayerPlan, x, places: Places, alive, rotary) -> torch.Tensor:
    """x (rows, hidden) behind the layer; rows that left stay as they are."""
    if plan == LayerPlan.off():
        return x
    before, after = names.scales(block)
    added = before * attention(block, names, plan, names.norms(block)[0](x), places, alive, rotary)
    if plan.attention == "none":
        added = torch.where(places.is_patch[:, None], 0.0, added)
    y = x + added
    y = y + after * feed_forward(block, names, plan, names.norms(block)[1](y), places.is_patch)
    return torch.where(alive[:, None], y, x)


def kept(plan: LayerPlan, index: int, x, places: Places, alive) -> torch.Tensor:
    """Who is alive behind a layer: of the living patches of each part, a share, in raster order where all are equal."""
    alive = alive.clone()
    for part in places.part.unique():
        own = torch.nonzero((places.part == part) & places.is_patch & alive).flatten()
        own = own[torch.argsort(places.y[own] * 1000 + places.x[own])]
        count = min(len(own), max(1, int(len(own) * plan.tokens.keep + 1e-6)))
        if plan.tokens.by == "norm":
            chosen = torch.argsort(-x[own].norm(dim=-1), stable=True)[:count]
        else:
            chosen = (2 * torch.arange(count) + 1) * len(own) // (2 * count)
        alive[own] = False
        alive[own[chosen]] = True
    return alive


def states(
    blocks, names, plans, hidden, places: Places, windows: Places | None, rotary, is_windowed=(), alive=None
) -> list:
    """What goes into the first layer and what comes out of each, (rows, hidden), in the rows' own order."""
    found, alive = [hidden], torch.ones(len(hidden), dtype=torch.bool) if alive is None else alive
    for index, (block, plan) in enumerate(zip(blocks, plans, strict=True)):
        parts = windows if is_windowed and is_windowed[index] else places
        found.append(layer(block, names, plan, found[-1], parts, alive, rotary))
        if plan.tokens is not None:
            alive = kept(plan, index, found[-1], places, alive)
    return found
