"""The float64 oracle: what a plan means, by dense masks over whole sequences. Written for reading, not for speed.

It shares no code with the executor. Every sequence is computed at once and from scratch: what a row sees depends on
positions alone, so prefill, chunks, decode and caches must all give these numbers. It is differentiable.
Semantics: DESIGN.md sections 3 and 6; "zero": the official code's arithmetic (arXiv 2410.06169). Only where tokens
leave does it matter in which calls a sequence came: each call's visual tokens compete among themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import linear

from vis_sparse.layout.layout import VisualLayout
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood
from vis_sparse.plans.plan import VisualPlan


@dataclass(frozen=True)
class Grid:
    """Per position (batch, length): the segment it belongs to (-1: not visual) and its place (t, y, x) there."""

    segment: torch.Tensor
    t: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor
    last: torch.Tensor  # (batch, length, 2): the segment's greatest y and x

    @property
    def visual(self) -> torch.Tensor:
        return self.segment >= 0


def grid_of(layout: VisualLayout, length: int) -> Grid:
    segment = torch.full((layout.batch_size, length), -1)
    t, y, x = (torch.zeros(layout.batch_size, length, dtype=torch.long) for _ in range(3))
    last = torch.zeros(layout.batch_size, length, 2, dtype=torch.long)
    for number, s in enumerate(layout.segments):
        for index in range(s.size):
            where = s.sample, s.start + index
            segment[where] = number
            t[where] = index // (s.height * s.width)
            y[where] = index // s.width % s.height
            x[where] = index % s.width
            last[where] = torch.tensor([s.height - 1, s.width - 1])
    return Grid(segment, t, y, x, last)


def near_keys(near: Neighborhood, grid: Grid) -> torch.Tensor:
    """(batch, query, key): visual keys inside the window of each visual query."""

    def along(place: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        # the queries of one stride x stride block (cut off at the border) share the union of their windows
        first = place // near.stride * near.stride
        final = torch.minimum(first + near.stride - 1, last)
        key = place[:, None, :]
        return (key >= first[:, :, None] - near.radius) & (key <= final[:, :, None] + near.radius)

    keys = along(grid.y, grid.last[..., 0]) & along(grid.x, grid.last[..., 1])
    keys &= (grid.t[:, :, None] - grid.t[:, None, :]).abs() <= near.frames
    keys &= (grid.segment[:, :, None] == grid.segment[:, None, :]) & grid.visual[:, :, None]
    if near.direction == "causal":
        keys &= at_or_before(grid.segment.shape[1])
    return keys


def at_or_before(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def active_heads(layer: LayerPlan, num_heads: int) -> torch.Tensor:
    return torch.ones(num_heads, dtype=torch.bool) if layer.heads is None else torch.tensor(layer.heads)


def visible(plan: VisualPlan, layer: LayerPlan, heads, grid: Grid, real, alive) -> torch.Tensor:
    """(batch, head, query, key): the keys that enter each query's softmax. alive: (batch, length), not left yet."""
    causal = at_or_before(real.shape[1])
    visual_query, visual_key = grid.visual[:, :, None], grid.visual[:, None, :]
    text = causal & real[:, None, :] & ~visual_key
    window = near_keys(layer.attention, grid) if isinstance(layer.attention, Neighborhood) else causal & visual_key
    of_visual, of_text = visual_query & window, ~visual_query & causal & visual_key
    if plan.semantics == "exclude":
        of_text = of_text & layer.text_reads
        keys = text[:, None] | ((of_visual | of_text)[:, None] & heads[:, None, None])
    else:
        keys = (text | of_visual | of_text)[:, None].expand(-1, len(heads), -1, -1)
    keys = keys & alive[:, None, None, :]
    # rows of padding and rows that left are nobody's business, but must not be NaN
    return keys | torch.eye(real.shape[1], dtype=torch.bool)


def attention(plan, layer, module, x, rotary, grid, real, alive) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention adds to every row, and its weights (batch, head, query, key)."""
    config, (batch, length, _) = module.config, x.shape
    num_heads = config.num_attention_heads
    heads = active_heads(layer, num_heads)

    def heads_of(projected):
        return projected.view(batch, length, -1, module.head_dim).transpose(1, 2)

    if hasattr(module, "qkv_proj"):
        own, shared = num_heads * module.head_dim, config.num_key_value_heads * module.head_dim
        projections = _linear(module.qkv_proj, x).split([own, shared, shared], dim=-1)
    else:
        projections = (_linear(proj, x) for proj in (module.q_proj, module.k_proj, module.v_proj))
    q, k, v = map(heads_of, projections)
    if hasattr(module, "q_norm"):
        q, k = norm(module.q_norm, q), norm(module.k_norm, k)
    q, k = rotate(q, *rotary), rotate(k, *rotary)
    k, v = (kv.repeat_interleave(num_heads // kv.shape[1], dim=1) for kv in (k, v))
    scores = q @ k.transpose(-1, -2) * module.head_dim**-0.5
    weights = scores.masked_fill(~visible(plan, layer, heads, grid, real, alive), -torch.inf).softmax(-1)
    if plan.semantics == "zero":
        counts = heads & layer.text_reads
        weights = weights.masked_fill(grid.visual[:, None, None, :] & ~counts[:, None, None], 0)
    out = weights @ v
    out = out.masked_fill((grid.visual[:, None, :] & ~heads[:, None])[..., None], 0)
    out = _linear(module.o_proj, out.transpose(1, 2).reshape(batch, length, -1))
    return out.masked_fill(grid.visual[..., None], 0) if layer.attention == "none" else out, weights


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = x.chunk(2, dim=-1)
    x = x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([x, rest], dim=-1)


def ffn(layer: LayerPlan, module, x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What the FFN adds to every row."""
    if hasattr(module, "gate_up_proj"):
        gate, up = _linear(module.gate_up_proj, x).chunk(2, dim=-1)
        inner = module.activation_fn(gate) * up
    else:
        inner = module.act_fn(_linear(module.gate_proj, x)) * _linear(module.up_proj, x)
    neurons = layer.neurons(inner.shape[-1])
    used = torch.zeros(inner.shape[-1], dtype=torch.bool)
    used[list(range(neurons)) if isinstance(neurons, int) else list(neurons)] = True
    out = _linear(module.down_proj, inner.masked_fill(grid.visual[..., None] & ~used, 0))
    return out if used.any() else out.masked_fill(grid.visual[..., None], 0)


def norm(module, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight.double()


def _linear(module, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight.double(), None if module.bias is None else module.bias.double())


def default_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids as `generate` counts them: real tokens only."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def remaining(tokens, index: int, x, weights, grid: Grid, real, alive, calls) -> torch.Tensor:
    """`alive` after layer `index`, whose outputs are x. calls: (first, last + 1) column of each call."""
    alive = alive.clone()
    for sample in range(len(x)):
        for first, end in calls:
            visual = [c for c in range(first, end) if grid.visual[sample, c] and alive[sample, c]]
            texts = [c for c in range(first, end) if real[sample, c] and not grid.visual[sample, c]]
            count = max(1, int(len(visual) * tokens.keep + 1e-6))
            if not visual:
                continue
            if tokens.by == "attention":
                assert texts and texts[-1] > visual[-1], "who should choose?"
                scores = weights[sample, :, texts[-1], visual].mean(0)
                kept = sorted(range(len(visual)), key=lambda i: (-scores[i], i))[:count]
            elif tokens.by == "norm":
                kept = sorted(range(len(visual)), key=lambda i: (-x[sample, visual[i]].norm(), i))[:count]
            elif tokens.by == "uniform":
                kept = [int((i + 0.5) * len(visual) / count) for i in range(count)]
            elif tokens.by == "random":
                kept = np.random.default_rng(index).permutation(len(visual))[:count].tolist()
            else:
                kept = [i for i, c in enumerate(visual) if on_sub_grid(tokens.keep, grid, sample, c)]
            for i, column in enumerate(visual):
                alive[sample, column] = i in kept
    return alive


def on_sub_grid(keep: float, grid: Grid, sample: int, column: int) -> bool:
    """Whether a token lies on every `down`-th row and every `across`-th column of its grid."""
    height, width = (grid.last[sample, column] + 1).tolist()
    places = {step: range((step - 1) // 2, max(height, width), step) for step in range(1, max(height, width) + 1)}

    def kept(down, across):
        return sum(y in places[down] and x in places[across] for y in range(height) for x in range(width))

    pairs = [(down, across) for down in range(1, height + 1) for across in range(1, width + 1)]
    best = min(pairs, key=lambda p: (abs(kept(*p) - keep * height * width), abs(p[0] - p[1]), p[0]))
    return int(grid.y[sample, column]) in places[best[0]] and int(grid.x[sample, column]) in places[best[1]]


def hidden_states(
    text, plan, layout, embeds, attention_mask=None, position_ids=None, added=(), cuts=(), came=None
) -> list[torch.Tensor]:
    """[inputs, output of layer 0, ..., output of the last layer after the final norm], each (batch, length, width).

    text: an unpatched transformers text model of the Llama kind. attention_mask: (batch, length), 1 = real token.
    added: for each of the first layers, what is added to its output at visual tokens (DeepStack), in sequence order.
    cuts: columns between two calls. came: (batch, length) bool, the columns that come into the first layer; None: all.
    Rows that left keep the value that they had then.
    """
    if attention_mask is None:
        attention_mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    if position_ids is None:
        position_ids = default_positions(attention_mask)
    x = embeds.double()
    grid, real = grid_of(layout, x.shape[1]), attention_mask.bool()
    rotary = text.rotary_emb(x, position_ids)
    states, alive = [x], torch.ones_like(real) if came is None else came
    ends = [*[cut for cut in cuts if cut < x.shape[1]], x.shape[1]]
    calls = list(zip([0, *ends], ends))
    for index, (layer, module) in enumerate(zip(plan.layers, text.layers, strict=True)):
        before, normed = x, norm(module.input_layernorm, x)
        change, weights = attention(plan, layer, module.self_attn, normed, rotary, grid, real, alive)
        x = x + change
        x = x + ffn(layer, module.mlp, norm(module.post_attention_layernorm, x), grid)
        if index < len(added):
            x = x.masked_scatter(grid.visual[..., None], x[grid.visual] + added[index].double())
        x = torch.where(alive[..., None], x, before)
        if layer.tokens is not None:
            alive = remaining(layer.tokens, index, x, weights, grid, real, alive, calls)
        states.append(x)
    states[-1] = norm(text.norm, x)
    return states


def logits(
    model, plan, layout, embeds, attention_mask=None, position_ids=None, added=(), cuts=(), came=None
) -> torch.Tensor:
    """Logits of all rows of a (never patched) LLaVA-like `model`."""
    text = model.model.language_model
    states = hidden_states(text, plan, layout, embeds, attention_mask, position_ids, added, cuts, came)
    return _linear(model.lm_head, states[-1])


def greedy(model, plan, layout, embeds, attention_mask, steps: int) -> torch.Tensor:
    """(batch, steps): the most likely next tokens, the whole sequence recomputed for each."""
    tokens, cuts = [], [embeds.shape[1]]
    for _ in range(steps):
        tokens.append(logits(model, plan, layout, embeds, attention_mask, cuts=cuts)[:, -1].argmax(-1, keepdim=True))
        embeds = torch.cat([embeds, model.get_input_embeddings()(tokens[-1]).to(embeds)], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(tokens[-1])], dim=1)
    return torch.cat(tokens, dim=1)


def compared_rows(plan, layout, attention_mask, index: int | None = None) -> torch.Tensor:
    """(batch, length): rows of `hidden_states[index]` (None: the last) that the plan defines.

    Real text rows always; visual rows while they are alive: to the end in dense and "zero" plans, else as long as
    text still reads them in a layer to come.
    """
    real = attention_mask.bool()
    if plan.is_dense or plan.semantics == "zero":
        return real
    to_come = () if index is None else plan.layers[index:]
    alive = any(layer.text_reads and (layer.heads is None or any(layer.heads)) for layer in to_come)
    return real if alive else real & ~grid_of(layout, real.shape[1]).visual
