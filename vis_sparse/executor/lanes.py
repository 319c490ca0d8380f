"""The executor: text rows and visual rows through the decoder layers, each layer doing what its plan asks for.

The rows of a call are one matrix, text rows first and packed visual rows after them, so that norms, residuals and
the products of layers that are dense for both lanes are done once over all rows. Everything else runs on the slice
of rows and the cut of weights that the schedule names: an operation saved is an operation never dispatched.
Families are unknown here; they hand over a `Decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..kernels import Backend
from ..layout.packing import Packing, on_device
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork, schedule
from .cache import Book, LaneCacheLayer, Store
from .call import Call
from .head_map import head_map
from .kept_cuts import KeptCuts
from .shared_gradients import products, shares_gradient
from .token_scores import attention_received, norms, on_host
from .tokens import check_text_follows, choose
from .transformers_internals import keeps_no_activations
from .weights import CutLinear, Selection, apply, index_on, is_plain, select, tensors, unit_columns


@dataclass(frozen=True)
class DecoderLayer:
    """Where the modules of one decoder layer (pre-norm, gated FFN) are.

    parts: for each of input_norm, query, key, value, output, post_norm, gate, up, down and activation, and of
    query_norm and key_norm (over a head's width) where the layer has them, the module that holds it and the name
    there: adapters put other modules in these places. scale: of the attention scores. fused: for parts that share
    one linear layer, which of its outputs are theirs.
    """

    parts: dict[str, tuple[nn.Module, str]]
    scale: float
    fused: dict[str, range] = field(default_factory=dict)

    @property
    def checkpoints(self) -> bool:
        """Whether the layer keeps no activations and is run again in the backward pass (no cache then)."""
        block, _ = self.parts["input_norm"]
        return keeps_no_activations(block)

    def module(self, part: str) -> nn.Module:
        owner, name = self.parts[part]
        module = owner._modules.get(name)  # many times quicker than the attribute
        return getattr(owner, name) if module is None else module

    def apply(self, part: str, x: torch.Tensor) -> torch.Tensor:
        """A whole linear part on x (rows, in)."""
        return apply(self.module(part), x, self.fused.get(part))

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


class LaneLayer:
    """One decoder layer under a plan."""

    def __init__(self, layer: DecoderLayer, work: LayerWork, decoder: Decoder, zero: bool, backend: Backend):
        self.layer, self.work, self.backend = layer, work, backend
        self.head_dim = decoder.head_dim
        self.has_norms = "query_norm" in layer.parts
        self.heads = head_map(work, decoder.num_heads, decoder.num_kv_heads, zero)
        units = decoder.num_kv_heads * self.heads.expand
        self.seen, self.rest, self.visual_units = (
            Selection(heads, units) for heads in (self.heads.seen, self.heads.rest, self.heads.keys)
        )
        self.seen_queries, self.rest_queries, self.merge = (
            Selection(heads, decoder.num_heads)
            for heads in (self.heads.seen_queries, self.heads.rest_queries, self.heads.merge)
        )
        wanted = {"query": work.query_heads, "key": work.key_heads, "value": work.key_heads}
        total = {"query": decoder.num_heads, "key": decoder.num_kv_heads, "value": decoder.num_kv_heads}
        self.shared = {name for name in wanted if len(wanted[name]) == total[name]}
        self.cut_names = [name for name in wanted if name not in self.shared and wanted[name]]
        self.cut_sizes = [len(wanted[name]) for name in self.cut_names]
        self.cut = CutLinear(
            layer.module,
            self.cut_names,
            rows=[layer.outputs(name, unit_columns(wanted[name], self.head_dim)) for name in self.cut_names],
        )
        self.cut_output = CutLinear(
            layer.module,
            ["output"],
            columns=unit_columns(work.query_heads, self.head_dim),
            width=decoder.num_heads * self.head_dim,
        )
        neurons = range(work.neurons) if isinstance(work.neurons, int) else work.neurons
        self.whole_ffn = len(neurons) == decoder.ffn_size
        self.has_ffn = len(neurons) > 0
        self.cut_gate, self.cut_up = (
            CutLinear(layer.module, [name], rows=[layer.outputs(name, neurons)]) for name in ("gate", "up")
        )
        self.cut_down = CutLinear(layer.module, ["down"], columns=tuple(neurons), width=decoder.ffn_size)
        # all rows read the same keys in the same heads: one causal attention over the whole sequence
        self.is_joint = (
            "query" in self.shared
            and "key" in self.shared
            and work.attention == "full"
            and self.heads.blind is None
            and not self.heads.zeroed
            and not self.heads.rest
        )

    @property
    def uses_visual(self) -> bool:
        return bool(self.work.key_heads) or self.work.updates

    @property
    def cuts(self) -> tuple[CutLinear, ...]:
        return (self.cut, self.cut_output, self.cut_gate, self.cut_up, self.cut_down)

    def _apply(self, part: str, x: torch.Tensor) -> torch.Tensor:
        return self.layer.apply(part, x)

    def _normed(self, name: str, y: torch.Tensor) -> torch.Tensor:
        """Queries or keys (rows, heads, head_dim) after the layer's norm of them, if it has one."""
        return self.layer.module(f"{name}_norm")(y) if f"{name}_norm" in self.layer.parts else y

    def __call__(
        self, x, call: Call, cos, sin, cached: LaneCacheLayer | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (text rows + visual rows, or text rows alone, hidden) -> the same after the layer, and the visual rows'
        scores where tokens leave by attention. x may be reused."""
        num_text, stores = call.num_text, (cached.seen, cached.rest) if cached else (Store(), Store())
        text, visual, both = self._project(self.layer.module("input_norm")(x), num_text, cos, sin)
        scored = self.scores_tokens and x.shape[0] > num_text
        x = self._attend(x, num_text, text, visual, both, call, stores)
        scores = self._scores(text["query"], call, stores[0]) if scored else None
        return self._feed_forward(x, num_text), scores

    @property
    def scores_tokens(self) -> bool:
        return self.work.tokens is not None and self.work.tokens.by == "attention"

    @torch.no_grad()
    def _scores(self, query, call: Call, seen: Store):
        """What each visual row gets of the attention of the text row that ranks its sample's, (num_visual,)."""
        heads, last = self.heads, call.ranking_rows(call.by_sample(query))
        readers = None
        if heads.blind is not None:
            readers = index_on(tuple(i for i, blind in enumerate(heads.blind) if not blind), last.device)
        last = self.seen_queries(last, 1)
        return call.by_packed(attention_received(last, seen.tensors[0], call.read_slots, readers, self.layer.scale))

    def _project(self, h, num_text, cos, sin):
        """Queries, keys and values of the text rows, of the visual rows, and of both where one product gave them:
        (rows, heads, head_dim), rotated."""
        text, visual, both = {}, {}, {}
        has_visual = h.shape[0] > num_text
        own = h[:num_text] if has_visual else h
        for name in ("query", "key", "value"):
            rows = h if has_visual and name in self.shared else own
            count = rows.shape[0]
            # the fused attention kernels want rows that lie one after the other
            y = self._apply(name, rows).contiguous()
            y = y.view(count, y.shape[1] // self.head_dim, self.head_dim)
            if name != "value":
                every = count == cos.shape[0]
                y = rotate(self._normed(name, y), cos if every else cos[:count], sin if every else sin[:count])
            text[name] = both[name] = y
            if count > num_text:
                text[name], visual[name] = y[:num_text], y[num_text:]
        if has_visual and self.cut_names:
            y = self.cut(h[num_text:]).contiguous().unflatten(1, (-1, self.head_dim))
            pieces = dict(zip(self.cut_names, y.split(self.cut_sizes, 1)))
            turned = {name: self._normed(name, piece) for name, piece in pieces.items() if name != "value"}
            if turned:
                sizes = [piece.shape[1] for piece in turned.values()]
                # queries and keys lie side by side: one rotation for both
                y = y[:, : sum(sizes)] if not self.has_norms else torch.cat(list(turned.values()), 1)
                pieces.update(zip(turned, rotate(y, cos[num_text:], sin[num_text:]).split(sizes, 1)))
            visual.update(pieces)
        if self.heads.expand > 1:
            for lane in (text, visual) if has_visual else (text,):
                for name in ("key", "value"):
                    lane[name] = lane[name].repeat_interleave(self.heads.expand, dim=1)
        return text, visual, both

    def _attend(self, x, num_text, text, visual, both, call: Call, stores):
        has_visual = x.shape[0] > num_text
        keys, values = self._store(text, visual, call, stores, has_visual)
        if self.is_joint and has_visual and call.order is not None:
            rows = call.joint_attention(self.backend, both, self.layer.scale)
            return add_rows(x, 0, self._apply("output", rows.flatten(1)))
        out = self._text_attention(text["query"], call, stores).flatten(0, 1).flatten(1)
        if not (has_visual and self.work.query_heads):
            x = add_rows(x, 0, self._apply("output", out))
            return self._add_bias(x, num_text) if has_visual and self.work.attention != "none" else x
        pattern = call.visual_pattern(self.work.attention, self.work.stores)
        if self.heads.visual_keys is not None:
            keys, values = (select(t, 2, self.heads.visual_keys) for t in (keys, values))
        seen = self.backend.visual_attention(visual["query"], keys, values, pattern, self.layer.scale).flatten(1)
        if "query" in self.shared:
            return add_rows(x, 0, self._apply("output", torch.cat([out, seen])))
        if out.requires_grad:
            return x + torch.cat(self._both("output", self.cut_output, out, seen))
        x = add_rows(x, 0, self._apply("output", out))
        return add_rows(x, num_text, self.cut_output(seen))

    def _add_bias(self, x, num_text):
        """Visual rows that attend in no head still get what the output projection makes of nothing: its bias."""
        module = self.layer.module("output")
        if is_plain(module):
            _, bias = tensors(module)
        else:
            bias = module(x.new_zeros(1, self.cut_output.width))[0]
        return x if bias is None else add_rows(x, num_text, bias.expand(x.shape[0] - num_text, -1))

    def _store(self, text, visual, call: Call, stores, has_visual: bool):
        """Append the call's keys and values; returns the keys and values that visual queries read."""
        seen, rest = stores
        heads = self.heads
        new_text = {name: call.by_sample(text[name]) for name in ("key", "value")}
        new_visual = None
        if has_visual and heads.keys:
            values = visual["value"]
            if heads.zeroed:
                values = values.index_fill(1, index_on(heads.zeroed, values.device), 0.0)
            new_visual = {"key": call.visual_by_sample(visual["key"]), "value": call.visual_by_sample(values)}
        past_rest = rest.tensors if rest.length else None
        if heads.rest:
            rest.append(*(self.rest(new_text[name], 2) for name in ("key", "value")))
        if heads.seen:
            new = [self.seen(new_text[name], 2) for name in ("key", "value")]
            if new_visual:
                new = [torch.cat([new_visual[name], t], 1) for name, t in zip(("key", "value"), new)]
            return seen.append(*new)
        if not (new_visual and self.work.query_heads):
            return None, None
        # nobody reads these keys after the call: they are joined with the text's and forgotten
        joined = []
        for index, name in enumerate(("key", "value")):
            past = [] if past_rest is None else [self.visual_units(past_rest[index], 2)]
            joined.append(torch.cat([*past, new_visual[name], self.visual_units(new_text[name], 2)], 1))
        return joined

    def _text_attention(self, query, call: Call, stores):
        """Text queries over the text keys, and the visual keys in the heads that read them."""
        query, heads, scale = call.by_sample(query), self.heads, self.layer.scale
        attention = self.backend.text_attention
        seen = rest = None
        if heads.seen:
            part = self.seen_queries(query, 2)
            seen = attention(part, *stores[0].tensors, call.text_pattern(True, heads.blind), scale)
        if heads.rest:
            part = self.rest_queries(query, 2)
            rest = attention(part, *stores[1].tensors, call.text_pattern(False), scale)
        if seen is None or rest is None:
            return rest if seen is None else seen
        return self.merge(torch.cat([seen, rest], 2), 2)

    def _both(self, part: str, cut: CutLinear, text, visual):
        """A part on text rows, and its cut on visual rows."""
        module = self.layer.module(part)
        if part not in self.layer.fused and is_plain(module):
            weight, bias = tensors(module)
            if shares_gradient(weight):
                return products(text, visual, weight, bias, cut.dim, cut.indices)
        return self._apply(part, text), cut(visual)

    def _feed_forward(self, x, num_text):
        has_visual = x.shape[0] > num_text
        shared = has_visual and self.whole_ffn
        cut = has_visual and self.has_ffn and not self.whole_ffn
        h = self.layer.module("post_norm")(x if shared or cut or not has_visual else x[:num_text])
        activation = self.layer.module("activation")
        if cut and h.requires_grad:
            lanes = h[:num_text], h[num_text:]
            gates, ups = self._both("gate", self.cut_gate, *lanes), self._both("up", self.cut_up, *lanes)
            inner = (activation(gate) * up for gate, up in zip(gates, ups))
            return x + torch.cat(self._both("down", self.cut_down, *inner))
        rows = h[:num_text] if cut else h
        inner = activation(self._apply("gate", rows)) * self._apply("up", rows)
        x = add_rows(x, 0, self._apply("down", inner))
        if cut:
            rows = h[num_text:]
            inner = activation(self.cut_gate(rows)) * self.cut_up(rows)
            x = add_rows(x, num_text, self.cut_down(inner))
        return x


class LaneExecutor:
    """A decoder under a plan. Built once a patch; heads of the plan must be resolved to masks."""

    def __init__(self, decoder: Decoder, plan: VisualPlan, backend: Backend):
        self.decoder, self.plan = decoder, plan
        zero = plan.semantics == "zero"
        work = schedule(plan, decoder.num_heads, decoder.num_kv_heads, decoder.ffn_size)
        self.layers = [LaneLayer(layer, w, decoder, zero, backend) for layer, w in zip(decoder.layers, work)]
        self.kept_cuts = KeptCuts(cut for lane in self.layers for cut in lane.cuts)
        self.last_use = max((i for i, lane in enumerate(self.layers) if lane.uses_visual), default=-1)

    @property
    def checkpoints(self) -> bool:
        return torch.is_grad_enabled() and any(lane.layer.checkpoints for lane in self.layers)

    @property
    def drops(self) -> bool:
        """Whether visual tokens leave between layers: the tables behind depend on values then."""
        return any(lane.work.tokens is not None for lane in self.layers)

    @property
    def ranks_by_text(self) -> bool:
        """Whether a text row decides which visual tokens go on somewhere."""
        return any(lane.scores_tokens for lane in self.layers)

    def check(self, packing: Packing, ranks: np.ndarray | None = None) -> None:
        """Raise LayoutError for a call that the plan cannot run on."""
        if self.ranks_by_text:
            check_text_follows(packing, ranks)

    def new_cache_layers(self, batch: int) -> list[LaneCacheLayer]:
        """Layers between which no token leaves hold the same tokens, and share a book."""
        layers, leads = [], True
        for lane in self.layers:
            book = Book(batch, self.plan) if leads else layers[-1].book
            layers.append(LaneCacheLayer(book, leads))
            leads = lane.work.tokens is not None
        return layers

    def adopt(self, keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]], cache_layers) -> None:
        """Fill new cache layers from a plain cache of text tokens.

        keys_values: for each layer K and V, (batch, kv_heads, slots, head_dim).
        """
        for lane, cached, (key, value) in zip(self.layers, cache_layers, keys_values):
            pair = [t.transpose(1, 2).repeat_interleave(lane.heads.expand, dim=2) for t in (key, value)]
            for store, units in ((cached.seen, lane.heads.seen), (cached.rest, lane.heads.rest)):
                if units:
                    store.append(*(select(t, 2, units) for t in pair))

    def run(
        self, hidden, cos, sin, call: Call, cache_layers=None, collect: list | None = None, added=()
    ) -> torch.Tensor:
        """The decoder layers on one call.

        hidden (batch, length, d); cos, sin (batch, length, head_dim). Appends to `cache_layers` if given, and each
        layer's input, in the shape of `hidden`, to `collect`. added: for each of the first layers, what is added to
        its visual rows, (num_visual, d). Returns hidden states of that shape, before the final
        norm; rows of visual tokens that no layer needs any more keep their last value.
        """
        x, cos, sin = call.split(hidden, cos, sin)
        # passed: where tokens left, all visual rows before and which of them went on
        whole, stopped, passed, recording = call, None, [], torch.is_grad_enabled()
        for index, lane in enumerate(self.layers):
            if collect is not None:
                collect.append(_merged(whole, hidden, x, stopped, passed).clone())
            if index == self.last_use + 1:
                x, stopped = x[: call.num_text], x[call.num_text :]
            if recording and lane.layer.checkpoints:
                x, scores = checkpoint(_on_a_copy, lane, x, call, cos, sin, use_reentrant=False)
            else:
                x, scores = lane(x, call, cos, sin, cache_layers[index] if cache_layers else None)
            if index < len(added) and x.shape[0] > call.num_text:
                rows = added[index]
                for _, kept in passed:
                    rows = rows.index_select(0, kept)
                x = add_rows(x, call.num_text, rows)
            if lane.work.tokens is not None:
                book = cache_layers[index + 1].book if cache_layers else Book(call.batch, self.plan)
                kept = self._kept(index, x, scores, call)
                following = call.leaving(kept, book)
                if call.in_sequence.num_visual:
                    kept = on_device(kept, x.device)
                    passed.append((x[call.num_text :], kept))
                    rows = torch.cat([torch.arange(call.num_text, device=x.device), call.num_text + kept])
                    x, cos, sin = (t.index_select(0, rows) for t in (x, cos, sin))
                call = following
        return _merged(whole, hidden, x, stopped, passed)

    def _kept(self, index: int, x: torch.Tensor, scores: torch.Tensor | None, call: Call) -> np.ndarray:
        """The packed visual rows that go on after layer `index`."""
        budget = self.layers[index].work.tokens
        if budget.by == "norm" and call.in_sequence.num_visual:
            scores = norms(x[call.num_text :].detach())
        return choose(budget, index, call.in_sequence.visual, None if scores is None else on_host(scores))


def _on_a_copy(lane: LaneLayer, x: torch.Tensor, *args):
    """A layer's run that leaves its input as it is: checkpointing runs it again from there."""
    return lane(x if x.requires_grad else x.clone(), *args)


def _merged(call: Call, hidden, x, stopped, passed) -> torch.Tensor:
    """The lanes' rows in the shape of `hidden`; rows that left have the value they had then."""
    if passed:
        x, rows = x[: call.num_text], x[call.num_text :] if stopped is None else stopped
        for before, kept in reversed(passed):
            rows = before.index_copy(0, kept, rows)
        stopped = rows
    return call.merge(hidden, x, stopped)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (rows, heads, head_dim); sin has the sign of its first half turned (`Call.split`).

    Where cos and sin are narrower than a head, the rest of the head is not rotated.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], -1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def add_rows(x: torch.Tensor, start: int, delta: torch.Tensor) -> torch.Tensor:
    """x with `delta` added to its rows from `start` on; in place unless gradients are recorded."""
    stop = start + delta.shape[0]
    if not (x.requires_grad or delta.requires_grad):
        (x if delta.shape[0] == x.shape[0] else x[start:stop]).add_(delta)
        return x
    if stop - start == x.shape[0]:
        return x + delta
    return torch.cat([x[:start], x[start:stop] + delta, x[stop:]])
