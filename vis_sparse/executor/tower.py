"""The executor of vision encoders: the rows of all images of a call through the layers, each doing what its plan says.

Layers are run one by one, where the model's own forward calls them: what stands before, between and behind them (patch
embedding, position embeddings, mergers, hidden states that somebody collects) is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels import Backend
from ..layout.layout import LayoutError
from ..plans.layer_plan import Neighborhood
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork, tower_schedule
from .bound import Bound, BoundLayer
from .decoder import DecoderLayer
from .kept_cuts import KeptCuts
from .rows import rotate
from .token_scores import norms, on_host
from .tower_tables import TowerTables
from .weights import CutLinear, Selection, unit_columns


@dataclass(frozen=True)
class TowerLayer(DecoderLayer):
    """Where the modules of one encoder layer are (pre-norm; an FFN of two matrices, or of three with a `gate`).

    parts: as in `DecoderLayer`, and "qkv" where queries, keys and values are one linear layer; query_norm and key_norm
    are over the width of all heads. scales: the names of what attention's and the FFN's results are multiplied with,
    on the block; None for nothing. windowed: whether rows attend within the model's own windows.
    """

    scales: tuple[str, str] | None = None
    windowed: bool = False

    def scale_of(self, index: int) -> torch.Tensor | None:
        """What the results of attention (0) or of the FFN (1) are multiplied with."""
        block, _ = self.parts["input_norm"]
        return None if self.scales is None else getattr(block, self.scales[index])


@dataclass(frozen=True)
class Tower:
    """The layers of a vision encoder and their sizes. has_globals: whether a class token goes with the patches."""

    layers: tuple[TowerLayer, ...]
    num_heads: int
    head_dim: int
    ffn_size: int
    has_globals: bool


class TowerExecutor:
    """An encoder under the plan of its layers. Heads of the plan must be resolved to masks."""

    def __init__(self, tower: Tower, plan: VisualPlan, backend: Backend):
        self.tower, self.plan = tower, plan
        work = tower_schedule(plan, tower.num_heads, tower.ffn_size, tower.has_globals)
        self.lanes = [each and TowerLane(layer, each, tower, backend) for layer, each in zip(tower.layers, work)]
        self.running = [lane for lane in self.lanes if lane is not None]
        self.kept_cuts = KeptCuts(cut for lane in self.running for cut in lane.cuts.values())
        self._bound: Bound | None = None

    def __getstate__(self):
        return {**vars(self), "_bound": None}  # a copy of the model has modules of its own

    def bound(self) -> dict[TowerLane, BoundLayer]:
        """The layers' modules as they are now; to be asked for once a call."""
        if self._bound is None or not self._bound.holds():
            self._bound = Bound([(lane.layer, lane.cuts) for lane in self.running])
        return dict(zip(self.running, self._bound.layers))


class TowerRun:
    """One call of an encoder, layer by layer.

    tables: of the rows that come into the next layer; replaced where patches leave. last: the last layer that somebody
    reads. received: if it `is_scored`, the attention that each row of the call gets in the last layer that runs, once
    that has run.
    """

    def __init__(self, executor: TowerExecutor, tables: TowerTables, last: int, scored: bool = False):
        self._executor, self.tables, self._last = executor, tables, last
        running = (index for index, lane in enumerate(executor.lanes) if lane is not None and index <= last)
        self.is_scored = scored
        self._scored = max(running, default=None) if scored else None
        self.received: torch.Tensor | None = None
        self._bound = executor.bound()
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self._angled: TowerTables | None = None

    def layer(self, index: int, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """The hidden states of all rows behind layer `index`, in the shape and the order of `hidden`.

        rotary: cos and sin (rows, head_dim) in the model's order, None without. Rows that left, and all rows in layers
        that are off or behind the last one read, keep their values.
        """
        lane = self._executor.lanes[index]
        if lane is None or index > self._last:
            return hidden
        rows, tables = hidden.reshape(-1, hidden.shape[-1]), self.tables
        if len(rows) != tables.num_rows:
            raise LayoutError(
                f"vision tower: got {len(rows)} rows in layer {index}, expected the {tables.num_rows} of its images"
            )
        x = rows if tables.index is None else rows.index_select(0, tables.index)
        if rotary is not None and self._angled is not tables:
            self._angles, self._angled = _angles(*rotary, tables.index), tables
        x = lane(x, tables, self._angles, self._bound[lane], self._score if index == self._scored else None)
        budget = lane.work.tokens
        if budget is not None:
            scores = on_host(norms(x[tables.num_globals :].detach())) if budget.by == "norm" else None
            self.tables = tables.keep(budget, index, scores)
        if tables.back is None:
            x = rows.index_copy(0, tables.index, x)
        elif tables.index is not None:
            x = x.index_select(0, tables.back)
        return x.reshape(hidden.shape)

    @torch.no_grad()
    def _score(self, lane: TowerLane, query: torch.Tensor, key: torch.Tensor) -> None:
        self.received = self.tables.received(query, key, lane.layer.windowed, lane.layer.scale)


def _angles(cos: torch.Tensor, sin: torch.Tensor, index: torch.Tensor | None):
    """Cos and sign-turned sin (rows, 1, head_dim), as `rows.rotate` takes them."""
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    cos, sin = (t if index is None else t.index_select(0, index) for t in (cos, sin))
    return cos[:, None], sin[:, None]


class TowerLane:
    """One encoder layer under a plan: what it does is sorted out here."""

    def __init__(self, layer: TowerLayer, work: LayerWork, tower: Tower, backend: Backend):
        self.layer, self.work, self.backend = layer, work, backend
        self.num_heads, self.head_dim = tower.num_heads, tower.head_dim
        self.has_norms = "query_norm" in layer.parts
        heads = work.value_heads
        self.heads = Selection(heads, tower.num_heads)
        rest = tuple(head for head in range(tower.num_heads) if head not in heads)
        self.rest = Selection(rest, tower.num_heads)
        self.merge = Selection([(*heads, *rest).index(head) for head in range(tower.num_heads)], tower.num_heads)
        self.all_heads = not rest
        self.is_whole = self.all_heads and work.attention == "full"
        # patches that are no queries have keys and values alone, all heads or not
        self.shares = self.all_heads and bool(work.query_heads)
        neurons = range(work.neurons) if isinstance(work.neurons, int) else work.neurons
        self.whole_ffn = len(neurons) == tower.ffn_size
        self.cuts_ffn = len(neurons) > 0 and not self.whole_ffn
        wanted = {"query": work.query_heads, "key": work.key_heads, "value": work.key_heads}
        # norms over all heads need the queries and keys of all
        names = [name for name, own in wanted.items() if own and not (self.has_norms and name != "value")]
        rows = [layer.outputs(name, unit_columns(wanted[name], self.head_dim)) for name in names]
        self.cut_names = names
        if "qkv" in layer.parts and names:
            names, rows = ["qkv"], [sum(rows, ())]
        find, width = layer.module, tower.num_heads * tower.head_dim
        columns = unit_columns(work.query_heads, self.head_dim)
        self.cuts = {
            "cut": CutLinear(find, names, rows=rows),
            "cut_output": CutLinear(find, ["output"], columns=columns, width=width),
            "cut_up": CutLinear(find, ["up"], rows=[layer.outputs("up", neurons)]),
            "cut_down": CutLinear(find, ["down"], columns=tuple(neurons), width=tower.ffn_size),
        }
        if "gate" in layer.parts:
            self.cuts["cut_gate"] = CutLinear(find, ["gate"], rows=[layer.outputs("gate", neurons)])
        if self.shares:
            del self.cuts["cut"], self.cuts["cut_output"]
        if not self.cuts_ffn:
            self.cuts = {name: cut for name, cut in self.cuts.items() if name in ("cut", "cut_output")}

    def __call__(
        self, x: torch.Tensor, tables: TowerTables, angles, parts: BoundLayer, score: Callable | None = None
    ) -> torch.Tensor:
        """x (rows, hidden) in the tables' order -> the same after the layer. angles: `_angles` of the rows, or None.
        score: called with the lane and the queries and keys of all heads."""
        windowed, scale = self.layer.windowed, self.layer.scale
        whole = self._projected(parts.input_norm(x), angles, parts) if self.is_whole or score is not None else None
        if score is not None:
            score(self, *whole[:2])
        if self.is_whole:
            out = tables.attend_all(*whole, windowed, self.backend, scale)
            x = x + self._scaled(0, parts.output(out.flatten(1)))
        elif self.work.query_heads or tables.num_globals:
            x = self._attend(x, tables, angles, parts)
        elif self.work.attention != "none":
            x = x + self._scaled(0, self._bias(x, parts))
        return self._feed_forward(x, tables.num_globals, parts)

    def _attend(self, x, tables: TowerTables, angles, parts: BoundLayer) -> torch.Tensor:
        """x with what attention gives to patches, in active heads, and to global tokens, in all."""
        first, work, scale, windowed = tables.num_globals, self.work, self.layer.scale, self.layer.windowed
        h = parts.input_norm(x)
        others = None
        if self.shares:
            query, key, value = self._projected(h, angles, parts)
        else:
            query, key, value = self._cut(h[first:], _from(angles, first), parts)
            if first:
                whole = self._projected(h[:first], _from(angles, 0, first), parts)
                active = [self.heads(t, 1) for t in whole]
                others = None if self.all_heads else [self.rest(t, 1) for t in whole]
                pieces = zip(active, (query, key, value))
                query, key, value = (of if own is None else torch.cat([of, own]) for of, own in pieces)
        attends, rows = bool(work.query_heads), None
        if isinstance(work.attention, Neighborhood) and attends:
            near = work.attention, windowed, self.backend, scale
            rows = tables.attend_near(query[first:], key, value, *near)
        elif attends:
            rows = tables.attend_all(query, key, value, windowed, self.backend, scale)
            rows, of_globals = rows[first:], rows[:first]
        if not first:
            return x + self._scaled(0, self._output(rows, parts))
        if len(self.heads) and (not attends or isinstance(work.attention, Neighborhood)):
            of_globals = tables.attend_all(query[:first], key, value, windowed, self.backend, scale, only_globals=True)
        elif not len(self.heads):
            of_globals = x.new_zeros(first, 0, self.head_dim)
        if others is not None:
            rest = tables.attend_globals(*others, self.backend, scale)
            of_globals = self.merge(torch.cat([of_globals, rest], 1), 1)
        pieces = [self._scaled(0, parts.output(of_globals.flatten(1)))]
        if attends:
            pieces.append(self._scaled(0, self._output(rows, parts)))
        elif work.attention != "none":
            pieces.append(self._scaled(0, self._bias(x[first:], parts)))
        else:
            pieces.append(torch.zeros_like(x[first:]))
        return x + torch.cat(pieces)

    def _output(self, rows, parts: BoundLayer) -> torch.Tensor:
        return (parts.output if self.all_heads else parts.cut_output)(rows.flatten(1))

    def _bias(self, x, parts: BoundLayer) -> torch.Tensor:
        """What rows that attend in no head get: what the output projection makes of nothing."""
        bias = parts.output.of_nothing(x, self.num_heads * self.head_dim)
        return torch.zeros_like(x) if bias is None else bias.expand(len(x), -1)

    def _projected(self, h, angles, parts: BoundLayer) -> list[torch.Tensor]:
        """Queries, keys and values of rows in all heads, (rows, heads, head_dim)."""
        if "qkv" in self.layer.parts:
            pieces = parts.qkv(h).chunk(3, 1)
        else:
            pieces = [getattr(parts, name)(h) for name in ("query", "key", "value")]
        if self.has_norms:
            pieces = parts.query_norm(pieces[0]), parts.key_norm(pieces[1]), pieces[2]
        query, key, value = (piece.unflatten(1, (self.num_heads, self.head_dim)) for piece in pieces)
        return [*(_rotated(t, angles) for t in (query, key)), value]

    def _cut(self, h, angles, parts: BoundLayer) -> list[torch.Tensor | None]:
        """Queries, keys and values of patches in the active heads; None for what nobody reads."""
        found: dict[str, torch.Tensor | None] = dict.fromkeys(("query", "key", "value"))
        if self.cut_names:
            y = parts.cut(h)
            y = y.unflatten(1, (len(self.cut_names), -1, self.head_dim))
            found |= zip(self.cut_names, y.unbind(1))
        if self.has_norms:
            for name, heads in (("query", self.work.query_heads), ("key", self.work.key_heads)):
                if heads:
                    whole = getattr(parts, f"{name}_norm")(getattr(parts, name)(h))
                    found[name] = self.heads(whole.unflatten(1, (self.num_heads, self.head_dim)), 1)
        for name in ("query", "key"):
            if found[name] is not None:
                found[name] = _rotated(found[name], angles)
        return list(found.values())

    def _feed_forward(self, x, first: int, parts: BoundLayer) -> torch.Tensor:
        """x with what the FFN makes of its rows: patches use their share of it, global tokens all."""
        if self.whole_ffn:
            return x + self._scaled(1, parts.down(_inner(parts.post_norm(x), parts, "")))
        if not first and not self.cuts_ffn:
            return x
        h = parts.post_norm(x if self.cuts_ffn else x[:first])
        pieces = [self._scaled(1, parts.down(_inner(h[:first], parts, "")))] if first else []
        if self.cuts_ffn:
            pieces.append(self._scaled(1, parts.cut_down(_inner(h[first:], parts, "cut_"))))
        else:
            pieces.append(torch.zeros_like(x[first:]))
        return x + (pieces[0] if len(pieces) == 1 else torch.cat(pieces))

    def _scaled(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        factor = self.layer.scale_of(index)
        return rows if factor is None else rows * factor


def _inner(h, parts: BoundLayer, cut: str) -> torch.Tensor:
    """The neurons of rows."""
    up = getattr(parts, f"{cut}up")(h)
    gate = getattr(parts, f"{cut}gate", None)
    return parts.activation(up) if gate is None else parts.activation(gate(h)) * up


def _from(angles, start: int, stop: int | None = None):
    return None if angles is None else tuple(t[start:stop] for t in angles)


def _rotated(x: torch.Tensor, angles: Sequence[torch.Tensor] | None) -> torch.Tensor:
    """Rotary embedding, computed as exactly as the angles are."""
    if angles is None:
        return x
    return rotate(x.to(torch.promote_types(x.dtype, angles[0].dtype)), *angles).to(x.dtype)
