"""One decoder layer under a plan.

The rows of a call are one matrix, text rows first and packed visual rows after them, so that norms, residuals and the
products of layers that are dense for both lanes are done once over all rows. Everything else runs on the slice of rows
and the cut of weights that the schedule names: an operation saved is an operation never dispatched.
"""

from __future__ import annotations

from itertools import groupby, zip_longest
from typing import NamedTuple

import torch

from ..kernels import Backend
from ..kernels.fused import Slots
from ..plans.schedule import LayerWork
from .bound import Bound, BoundLayer, own
from .cache import Store, halves
from .call import Call
from .decoder import Decoder, DecoderLayer
from .head_map import head_map
from .rows import add_rows, rotate, rotate_into
from .shared_gradients import products, shares_gradient
from .token_scores import attention_received
from .weights import CutLinear, Selection, by_linear, index_on, is_plain, tensors, unit_columns

_ALL, _QUERY, _KEYS = ("query", "key", "value"), ("query",), ("key", "value")


class Angles(NamedTuple):
    """cos and sign-turned sin (`Call.split`) of all rows, of the text rows and of the visual rows.

    in_sequence: whether the rows of the call stand as in the sequence (`Call.sequence`), not as lanes.
    """

    rows: tuple[torch.Tensor, torch.Tensor]
    text: tuple[torch.Tensor, torch.Tensor]
    visual: tuple[torch.Tensor, torch.Tensor]
    in_sequence: bool = False

    @classmethod
    def of(cls, cos: torch.Tensor, sin: torch.Tensor, num_text: int, in_sequence: bool = False) -> Angles:
        if in_sequence or len(cos) == num_text:
            return cls((cos, sin), (cos, sin), (cos, sin), in_sequence)
        return cls((cos, sin), (cos[:num_text], sin[:num_text]), (cos[num_text:], sin[num_text:]))


class LaneLayer:
    """One decoder layer under a plan: what it does is sorted out here, so that a call is a list of operations."""

    def __init__(self, layer: DecoderLayer, work: LayerWork, decoder: Decoder, zero: bool, backend: Backend):
        self.layer, self.work, self.backend = layer, work, backend
        self.head_dim, self.has_norms = decoder.head_dim, "query_norm" in layer.parts
        self.num = {"query": decoder.num_heads, "key": decoder.num_kv_heads}
        self.heads = heads = head_map(work, decoder.num_heads, decoder.num_kv_heads, zero)
        units = decoder.num_kv_heads * heads.expand
        self.units = tuple(Selection(each, units) for each in (heads.seen, heads.rest))
        self.visual_units = Selection(heads.keys, units)
        self.writes_steps = heads.expand == 1
        # where text has heads in both stores, those of each are put side by side once, and back behind the attention
        self.mixes = bool(heads.seen and heads.rest)
        by_store = [*heads.seen_queries, *heads.rest_queries]
        for start in (decoder.num_heads, decoder.num_heads + units):
            by_store += [start + unit for unit in (*heads.seen, *heads.rest)]
        self.by_store = Selection(by_store, len(by_store))
        self.query_sizes = [len(heads.seen_queries), len(heads.rest_queries)]
        self.unit_sizes = [len(heads.seen), len(heads.rest)]
        self.joined = _Joined([head in heads.seen_queries for head in range(decoder.num_heads)])
        self.zeroed = Selection([len(heads.keys) + unit for unit in heads.zeroed])
        self.visual_keys = None if heads.visual_keys is None else Selection(heads.visual_keys)
        # which projections visual rows share with the text rows: all three, keys and values, or else a cut of their own
        whole = len(work.key_heads) == decoder.num_kv_heads
        self.shares_all = whole and len(work.query_heads) == decoder.num_heads
        self.shares_keys = whole and not work.query_heads
        wanted = {"query": work.query_heads, "key": work.key_heads, "value": work.key_heads}
        if self.shares_all or self.shares_keys:
            wanted = {}
        names = [name for name, own in wanted.items() if own]
        find = layer.module
        rows = [layer.outputs(name, unit_columns(wanted[name], self.head_dim)) for name in names]
        columns = unit_columns(work.query_heads, self.head_dim)
        neurons = range(work.neurons) if isinstance(work.neurons, int) else work.neurons
        self.whole_ffn = len(neurons) == decoder.ffn_size
        self.cuts_ffn = len(neurons) > 0 and not self.whole_ffn
        self.cuts_heads = bool(names)
        self.cuts = {
            "cut": CutLinear(find, names, rows=rows),
            "cut_output": CutLinear(find, ["output"], columns=columns, width=decoder.num_heads * self.head_dim),
            "cut_gate": CutLinear(find, ["gate"], rows=[layer.outputs("gate", neurons)]),
            "cut_up": CutLinear(find, ["up"], rows=[layer.outputs("up", neurons)]),
            "cut_down": CutLinear(find, ["down"], columns=tuple(neurons), width=decoder.ffn_size),
        }
        # all rows read the same keys in the same heads: one causal attention over the whole sequence
        self.is_joint = (
            self.shares_all and work.attention == "full" and heads.blind is None and not heads.zeroed and not heads.rest
        )

    @property
    def keeps_sequence(self) -> bool:
        """Whether the layer does the same with rows of both lanes, whose order does not count then."""
        return self.is_joint and self.whole_ffn

    def rows(self, call: Call, hidden, cos, sin) -> tuple[torch.Tensor, Angles]:
        """The rows of a call, of its hidden states and angles, in the order in which the layer takes them."""
        in_sequence = self.takes_sequence(call) and call.has_every_column
        x, cos, sin = call.sequence(hidden, cos, sin) if in_sequence else call.split(hidden, cos, sin)
        return x, Angles.of(cos, sin, call.num_text, in_sequence)

    def takes_sequence(self, call: Call) -> bool:
        return self.is_joint and call.order is not None

    @property
    def uses_visual(self) -> bool:
        return bool(self.work.key_heads) or self.work.updates

    @property
    def scores_tokens(self) -> bool:
        return self.work.tokens is not None and self.work.tokens.by == "attention"

    def bound(self) -> BoundLayer:
        return Bound([(self.layer, self.cuts)]).layers[0]

    def __call__(
        self, x, call: Call, angles: Angles, parts: BoundLayer, stores, in_place: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (text rows + visual rows, or text rows alone, hidden) -> the same after the layer, and the visual rows'
        scores where tokens leave by attention. x may be reused.

        stores: the two of the layer's cache, or empty ones. in_place: whether nobody records or traces the call, so
        that what it makes may be overwritten. Where angles are `in_sequence`, so are the rows of x, and if the layer
        keeps them so (`keeps_sequence`), those that it gives; else those are lanes.
        """
        if angles.in_sequence:
            return self._in_sequence(x, call, angles, parts, stores, in_place)
        if x.shape[0] > call.num_text:
            return self._both_lanes(x, call, angles, parts, stores, in_place)
        if in_place and parts.turns_at_once and self.writes_steps and call.is_step and call.has_room(stores):
            query = self._into_stores(parts.input_norm(x), call, angles.text, parts, stores)
        else:
            query, kv = self._projected(parts.input_norm(x), _ALL, angles.text, parts, in_place)
            self._store(call.by_sample(kv), None, stores)
        x = _add(parts.output, x, 0, self._text_attention(query, call, stores), in_place)
        return self._feed_forward(x, x, None, parts, in_place), None

    def _in_sequence(self, x, call: Call, angles: Angles, parts: BoundLayer, stores, in_place: bool):
        """All rows read the same: one causal attention over the sequence as it is."""
        query, kv = self._projected(parts.input_norm(x), _ALL, angles.rows, parts, in_place)
        stores[0].append(call.by_slot(kv))
        rows = call.joint_attention(self.backend, query, halves(kv), self.layer.scale)
        scores = self._scores(call.to_lanes(query)[: call.num_text], call, stores[0]) if self.scores_tokens else None
        x = _add(parts.output, x, 0, rows, in_place)
        return self._feed_lanes(x if self.keeps_sequence else call.to_lanes(x), call, parts, in_place), scores

    def _both_lanes(self, x, call: Call, angles: Angles, parts: BoundLayer, stores, in_place: bool):
        num_text = call.num_text
        h = parts.input_norm(x)
        visual_query = visual_kv = None
        if self.shares_all:
            query, kv = self._projected(h, _ALL, angles.rows, parts, in_place)
            query, kv, visual_query, visual_kv = query[:num_text], kv[:num_text], query[num_text:], kv[num_text:]
        elif self.shares_keys:
            query, _ = self._projected(h[:num_text], _QUERY, angles.text, parts, in_place)
            _, kv = self._projected(h, _KEYS, angles.rows, parts, in_place)
            kv, visual_kv = kv[:num_text], kv[num_text:]
        else:
            query, kv = self._projected(h[:num_text], _ALL, angles.text, parts, in_place)
            if self.cuts_heads:
                y = parts.cut(h[num_text:]).contiguous()
                numbers = len(self.work.query_heads), len(self.work.key_heads)
                visual_query, visual_kv = self._turned(y, *numbers, angles.visual, parts, in_place)
                if self.heads.expand > 1:
                    visual_kv = visual_kv.repeat_interleave(self.heads.expand, dim=2)
        slots = None if visual_kv is None else self._slots(visual_kv, call)
        keys_values = self._store(call.by_sample(kv), slots, stores)
        out = self._text_attention(query, call, stores)
        x = self._add_attention(x, out, visual_query, keys_values, call, parts, in_place)
        scores = self._scores(query, call, stores[0]) if self.scores_tokens else None
        return self._feed_lanes(x, call, parts, in_place), scores

    def _into_stores(self, h, call, angles, parts: BoundLayer, stores):
        """A step's queries; its keys and values go where its tables say, turned on the way."""
        y = self._products(h, _ALL, parts, in_place=True)
        y = y.view(y.size(0), y.size(1) // self.head_dim, self.head_dim)
        query = None
        for place, (store, units) in enumerate(zip(stores, self.units)):
            if not units:
                continue
            key, value = (half.flatten(0, 1) for half in halves(store.buffer))
            slots = Slots(key, value, call.places(place, store), None if units.is_whole else units.on(y.device))
            turned = parts.turned_into(y, self.num["query"], self.num["key"], *angles, slots, query is None)
            query = turned if query is None else query
            store.step()
        return query

    def _projected(self, h, names: tuple[str, ...], angles, parts: BoundLayer, in_place: bool):
        """Of `names`: queries (rows, heads, head_dim), keys beside values (rows, 2, KV heads, head_dim), turned.

        Of layers that `mixes` the heads of the `seen` store come first in each."""
        y = self._products(h, names, parts, in_place)
        queries, keys = self.num["query"] * ("query" in names), self.num["key"] * ("key" in names)
        query, kv = self._turned(y, queries, keys, angles, parts, in_place, self.mixes)
        return query, kv if self.heads.expand == 1 else kv.repeat_interleave(self.heads.expand, dim=2)

    def _products(self, h, names: tuple[str, ...], parts: BoundLayer, in_place: bool) -> torch.Tensor:
        if in_place and parts.linears is not None and by_linear(h.size(0), parts.linears[0][0]["weight"]):
            return self._side_by_side(h, names, parts)
        if len(names) == 1:
            return parts.query(h).contiguous()
        return torch.cat([getattr(parts, name)(h) for name in names], 1)

    def _side_by_side(self, h, names: tuple[str, ...], parts: BoundLayer) -> torch.Tensor:
        """Small products where they are wanted, so that nothing has to be joined behind them."""
        found = [own(*parts.linears[_ALL.index(name)]) for name in names]
        sizes = [weight.size(0) for weight, _ in found]
        y = h.new_empty(h.size(0), sum(sizes))
        for (weight, bias), place in zip(found, y.split_with_sizes(sizes, 1)):
            if bias is None:
                torch.mm(h, weight.t(), out=place)
            else:
                torch.addmm(bias, h, weight.t(), out=place)
        return y

    def _turned(self, y, queries: int, keys: int, angles, parts: BoundLayer, in_place: bool, by_store: bool = False):
        """Of y (rows, queries + keys + values): the queries, and keys beside values, after norms and rotation."""
        y = y.view(y.size(0), y.size(1) // self.head_dim, self.head_dim)
        y = self.by_store(y, 1) if by_store else y
        if in_place and parts.turns_at_once:
            return parts.turned(y, queries, keys, *angles)
        turned = place = y[:, : queries + keys]
        if self.has_norms:
            pieces = ((parts.query_norm, y[:, :queries]), (parts.key_norm, y[:, queries : queries + keys]))
            turned = torch.cat([norm(piece) for norm, piece in pieces if piece.shape[1]], 1)
        if in_place:
            rotate_into(place, turned, *angles)
            return y[:, :queries], y[:, queries:].unflatten(1, (2, keys))
        turned = rotate(turned, *angles)
        return turned[:, :queries], torch.stack([turned[:, queries:], y[:, queries + keys :]], 1)

    def _slots(self, visual_kv, call: Call):
        """Visual keys and values by sample, (batch, visual slots, 2, units, head_dim)."""
        if self.zeroed:
            flat = visual_kv.flatten(1, 2).index_fill(1, self.zeroed.on(visual_kv.device), 0.0)
            visual_kv = flat.unflatten(1, visual_kv.shape[1:3])
        return call.visual_by_sample(visual_kv)

    def _store(self, text, visual, stores):
        """Append the call's keys and values, by sample; returns, side by side, those that visual queries read."""
        seen, rest = stores
        past_rest = rest.used if visual is not None and rest.length else None
        new, new_rest = text.split_with_sizes(self.unit_sizes, 3) if self.mixes else (text, text)
        if self.heads.rest:
            rest.append(new_rest)
        if self.heads.seen:
            return seen.append(new if visual is None else torch.cat([visual, new], 1))
        if visual is None or not self.work.query_heads:
            return None
        # nobody reads these keys after the call: they are joined with the text's and forgotten
        past = [] if past_rest is None else [self.visual_units(past_rest, 3)]
        return torch.cat([*past, visual, self.visual_units(text, 3)], 1)

    def _text_attention(self, query, call: Call, stores):
        """Text queries over the text keys, and the visual keys in the heads that read them; (rows, heads x width)."""
        query, scale, attention = call.by_sample(query), self.layer.scale, self.backend.text_attention
        if not self.heads.rest:
            out = attention(query, *stores[0].tensors, call.text_pattern(True, self.heads.blind), scale)
        elif not self.heads.seen:
            out = attention(query, *stores[1].tensors, call.text_pattern(False), scale)
        else:
            query, rest = query.split_with_sizes(self.query_sizes, 2)
            seen = attention(query, *stores[0].tensors, call.text_pattern(True, self.heads.blind), scale)
            rest = attention(rest, *stores[1].tensors, call.text_pattern(False), scale)
            out = self.joined(seen, rest, 2)
        return out.reshape(call.num_text, self.num["query"] * self.head_dim)

    def _add_attention(self, x, out, visual_query, keys_values, call: Call, parts: BoundLayer, in_place: bool):
        """x with what attention gives to both lanes."""
        num_text = call.num_text
        if not self.work.query_heads:
            x = _add(parts.output, x, 0, out, in_place)
            return self._add_bias(x, num_text, parts) if self.work.attention != "none" else x
        pattern = call.visual_pattern(self.work.attention, self.work.stores)
        keys_values = keys_values if self.visual_keys is None else self.visual_keys(keys_values, 3)
        keys_values = halves(keys_values)
        seen = self.backend.visual_attention(visual_query, *keys_values, pattern, self.layer.scale).flatten(1)
        if len(self.work.query_heads) == self.num["query"]:
            return _add(parts.output, x, 0, torch.cat([out, seen]), in_place)
        if out.requires_grad:
            return x + torch.cat(self._of_lanes("output", out, seen, parts))
        x = _add(parts.output, x, 0, out, in_place)
        return _add(parts.cut_output, x, num_text, seen, in_place)

    def _of_lanes(self, part: str, text, visual, parts: BoundLayer):
        """A linear part on text rows, and its cut on visual rows, while gradients are recorded."""
        module, cut = self.layer.module(part), f"cut_{part}"
        if part not in self.layer.fused and is_plain(module):
            weight, bias = tensors(module)
            if shares_gradient(weight):
                return products(text, visual, weight, bias, self.cuts[cut].dim, self.cuts[cut].selection)
        return getattr(parts, part)(text), getattr(parts, cut)(visual)

    def _add_bias(self, x, num_text, parts: BoundLayer):
        """Visual rows that attend in no head still get what the output projection makes of nothing: its bias."""
        bias = parts.output.of_nothing(x, self.num["query"] * self.head_dim)
        return x if bias is None else add_rows(x, num_text, bias.expand(x.shape[0] - num_text, -1))

    @torch.no_grad()
    def _scores(self, query, call: Call, seen: Store):
        """What each visual row gets of the attention of the text row that ranks its sample's, (num_visual,)."""
        heads, last = self.heads, call.ranking_rows(call.by_sample(query))
        readers = None
        if heads.blind is not None:
            readers = index_on(tuple(i for i, blind in enumerate(heads.blind) if not blind), last.device)
        last = last[:, : self.query_sizes[0]] if self.mixes else last
        return call.by_packed(attention_received(last, seen.tensors[0], call.unread_slots, readers, self.layer.scale))

    def _feed_lanes(self, x, call: Call, parts: BoundLayer, in_place: bool):
        """x with what the FFN makes of all rows, or of each lane its own."""
        h = x if self.whole_ffn or self.cuts_ffn else x[: call.num_text]
        return self._feed_forward(x, h, call.num_text if self.cuts_ffn else None, parts, in_place)

    def _feed_forward(self, x, h, cut_from: int | None, parts: BoundLayer, in_place: bool):
        """x with what the FFN makes of its first rows, `h`; those from `cut_from` on use the cut of visual rows."""
        h = parts.post_norm(h)
        if cut_from is not None and h.requires_grad:
            lanes = h[:cut_from], h[cut_from:]
            gates, ups = (self._of_lanes(part, *lanes, parts) for part in ("gate", "up"))
            inner = [parts.activation(gate) * factor for gate, factor in zip(gates, ups)]
            return x + torch.cat(self._of_lanes("down", *inner, parts))
        whole = h if cut_from is None else h[:cut_from]
        x = _add(parts.down, x, 0, _gated(whole, parts.gate, parts.up, parts, in_place), in_place)
        if cut_from is None:
            return x
        inner = _gated(h[cut_from:], parts.cut_gate, parts.cut_up, parts, in_place)
        return _add(parts.cut_down, x, cut_from, inner, in_place)


def _add(part, x, start: int, h, in_place: bool):
    """x with what `part` makes of h added to its rows from `start` on."""
    return part.add_to(x, start, h) if in_place else add_rows(x, start, part(h))


def _gated(h, gate, up, parts: BoundLayer, in_place: bool):
    if in_place and parts.gates_at_once:
        return parts.gated(gate(h), up(h))
    if in_place and parts.is_silu:
        return torch.nn.functional.silu(gate(h)).mul_(up(h))
    inner, factor = parts.activation(gate(h)), up(h)
    return inner.mul_(factor) if in_place else inner * factor


class _Joined:
    """Heads of two tensors in one order. first: for each head, whether it is the next of the first or of the second."""

    def __init__(self, first: list[bool]):
        runs = [(is_first, len(list(run))) for is_first, run in groupby(first)]
        self._sizes = [[size for is_first, size in runs if is_first == own] for own in (True, False)]
        self._begins = runs[0][0]

    def __call__(self, first: torch.Tensor, second: torch.Tensor, dim: int) -> torch.Tensor:
        pieces = [each.split_with_sizes(sizes, dim) for each, sizes in zip((first, second), self._sizes)]
        one, other = pieces if self._begins else reversed(pieces)
        return torch.cat([piece for pair in zip_longest(one, other) for piece in pair if piece is not None], dim)
