"""The executor: text rows and visual rows through the decoder layers, each layer doing what its plan asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from ..kernels import Backend
from ..layout.packing import Packing, on_device
from ..plans.plan import VisualPlan
from ..plans.schedule import schedule
from .bound import Bound, BoundLayer
from .cache import Book, LaneCacheLayer, Store
from .call import Call
from .decoder import Decoder
from .kept_cuts import KeptCuts
from .layer import Angles, LaneLayer
from .rows import add_rows
from .steps import Step, mask_of_step
from .token_scores import norms, on_host
from .tokens import check_text_follows, choose
from .weights import RECORDS, autocasts


class LaneExecutor:
    """A decoder under a plan. Built once a patch; heads of the plan must be resolved to masks."""

    def __init__(self, decoder: Decoder, plan: VisualPlan, backend: Backend):
        self.decoder, self.plan = decoder, plan
        zero = plan.semantics == "zero"
        work = schedule(plan, decoder.num_heads, decoder.num_kv_heads, decoder.ffn_size)
        self.layers = [LaneLayer(layer, w, decoder, zero, backend) for layer, w in zip(decoder.layers, work)]
        self.kept_cuts = KeptCuts(cut for lane in self.layers for cut in lane.cuts.values())
        self._bound: Bound | None = None
        # whether visual tokens leave, so that the tables behind depend on values, and whether a text row decides which
        # ones, or the prompt's text
        self.drops = plan.before is not None or any(lane.work.tokens is not None for lane in self.layers)
        self.ranks_by_text = any(lane.scores_tokens for lane in self.layers)
        self.asks_for_prompts = self.ranks_by_text or plan.before is not None and plan.before.reads_text
        self.last_use = max((i for i, lane in enumerate(self.layers) if lane.uses_visual), default=-1)

    def __getstate__(self):
        return {**vars(self), "_bound": None}  # a copy of the model has modules of its own

    def bound(self) -> Bound:
        """The layers' modules as they are now; to be asked for once a call."""
        bound = self._bound
        if bound is not None and torch.compiler.is_compiling():
            return bound  # what may change is the compiler's to guard
        if bound is None or not bound.holds():
            bound = self._bound = Bound([(lane.layer, lane.cuts) for lane in self.layers])
        return bound

    def alone(self, index: int) -> LaneExecutor:
        """An executor of one layer, which does what it does among all, with weights as they are now."""
        one = copy.copy(self)
        one.layers = self.layers[index : index + 1]
        one.last_use = 0 if index <= self.last_use else -1
        one.kept_cuts = KeptCuts(cut for lane in one.layers for cut in lane.cuts.values())
        one.kept_cuts.refresh()
        return one

    @property
    def checkpoints(self) -> bool:
        return torch.is_grad_enabled() and any(lane.layer.checkpoints for lane in self.layers)

    def check(self, packing: Packing, ranks: np.ndarray | None = None) -> None:
        """Raise LayoutError for a call that the plan cannot run on."""
        if self.ranks_by_text:
            check_text_follows(packing, ranks)

    def books(self) -> list[int]:
        """For each layer the number of its book: layers between which no token leaves hold the same tokens."""
        leaves = [lane.work.tokens is not None for lane in self.layers[:-1]]
        return [sum(leaves[:index]) for index in range(len(self.layers))]

    def new_cache_layers(self, batch: int) -> list[LaneCacheLayer]:
        numbers = self.books()
        books = [Book(batch, self.plan) for _ in range(numbers[-1] + 1)]
        leads = [index == 0 or numbers[index - 1] != number for index, number in enumerate(numbers)]
        return [LaneCacheLayer(books[number], first) for number, first in zip(numbers, leads)]

    def step(self, cache_layers, mask: torch.Tensor | None, device: torch.device) -> Step:
        """The tables of a decode step on filled cache layers, whose slots are added to their books.

        mask: (batch, columns with the step's own), 0 = padding, on any device; None = none.
        """
        mask = mask_of_step(mask, device)
        own = None if mask is None else mask[:, -1].clone()
        return linked([layer.book.step(mask, own, device) for layer in cache_layers if layer.leads])

    def fixed_step(self, cache_layers, mask: torch.Tensor | None) -> Step:
        """As `step`, on layers of one size (`LaneCacheLayer.fix`); to be advanced after it. mask: on their device."""
        mask = None if mask is None else mask.bool()
        return linked([layer.book.fixed.next(mask) for layer in cache_layers if layer.leads])

    def adopt(self, keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]], cache_layers) -> None:
        """Fill new cache layers from a plain cache of text tokens.

        keys_values: for each layer K and V, (batch, kv_heads, slots, head_dim).
        """
        for lane, cached, (key, value) in zip(self.layers, cache_layers, keys_values):
            pair = torch.stack([key, value], 1).permute(0, 3, 1, 2, 4).repeat_interleave(lane.heads.expand, dim=3)
            for store, units in zip((cached.seen, cached.rest), lane.units):
                if units:
                    store.append(units(pair, 3))

    def run(
        self, hidden, cos, sin, call: Call | Step, cache_layers=None, collect: list | None = None, added=(), bound=None
    ) -> torch.Tensor:
        """The decoder layers on one call.

        hidden (batch, length, d); cos, sin (batch, length, head_dim). Appends to `cache_layers` if given, and each
        layer's input, in the shape of `hidden`, to `collect`. added: for each of the first layers, what is added to
        its visual rows, (num_visual, d). bound: `bound()`, where it was asked for. Returns hidden states of that shape,
        before the final norm; rows of visual tokens that no layer needs any more keep their last value.
        """
        bound = self.bound() if bound is None else bound
        x, angles = self.layers[0].rows(call, hidden, cos, sin)
        # passed: where tokens left, all visual rows before and which of them went on
        whole, stopped, passed, recording = call, None, [], torch.is_grad_enabled()
        traced = torch.compiler.is_compiling() or RECORDS.get()
        in_place = not (recording or traced or autocasts(x.device))
        for index, (lane, parts) in enumerate(zip(self.layers, bound.layers)):
            if collect is not None:
                collect.append(_merged(whole, hidden, x, angles, call, stopped, passed).clone())
            if angles.in_sequence != lane.takes_sequence(call):
                turn, angles = _other_order(angles, call)
                x = turn(x)
            if index == self.last_use + 1:
                x, stopped = x[: call.num_text], x[call.num_text :]
            cached = cache_layers[index] if cache_layers else None
            stores = (cached.seen, cached.rest) if cached else (Store(), Store())
            if recording and lane.layer.checkpoints:
                x, scores = checkpoint(_on_a_copy, lane, x, call, angles, parts, use_reentrant=False)
            else:
                x, scores = lane(x, call, angles, parts, stores, in_place)
            if angles.in_sequence and not (lane.keeps_sequence and lane.work.tokens is None and index >= len(added)):
                turn, angles = _other_order(angles, call)
                x = turn(x) if lane.keeps_sequence else x
            if index < len(added) and x.shape[0] > call.num_text:
                rows = added[index]
                for _, kept in passed:
                    rows = rows.index_select(0, kept)
                x = add_rows(x, call.num_text, rows)
            if lane.work.tokens is not None and isinstance(call, Step):
                call = call.following
            elif lane.work.tokens is not None:
                book = cache_layers[index + 1].book if cache_layers else Book(call.batch, self.plan)
                kept = self._kept(index, x, scores, call)
                following = call.leaving(kept, book)
                if call.in_sequence.num_visual:
                    rows = on_device(np.concatenate([np.arange(call.num_text), call.num_text + kept]), x.device)
                    passed.append((x[call.num_text :], rows[call.num_text :] - call.num_text))
                    x, *turns = (t.index_select(0, rows) for t in (x, *angles.rows))
                    angles = Angles.of(*turns, call.num_text)
                call = following
        return _merged(whole, hidden, x, angles, call, stopped, passed)

    def _kept(self, index: int, x: torch.Tensor, scores: torch.Tensor | None, call: Call) -> np.ndarray:
        """The packed visual rows that go on after layer `index`."""
        budget = self.layers[index].work.tokens
        if budget.by == "norm" and call.in_sequence.num_visual:
            scores = norms(x[call.num_text :].detach())
        return choose(budget, index, call.in_sequence.visual, None if scores is None else on_host(scores))


def linked(steps: list[Step]) -> Step:
    """The tables of one step, those behind layers after which tokens left linked to those before."""
    for before, behind in zip(steps, steps[1:]):
        before.following = behind
    return steps[0]


def _on_a_copy(lane: LaneLayer, x: torch.Tensor, call: Call, angles: Angles, parts: BoundLayer):
    """A layer's run that leaves its input as it is: checkpointing runs it again from there, and without a cache."""
    return lane(x if x.requires_grad else x.clone(), call, angles, parts, (Store(), Store()))


def _other_order(angles: Angles, call: Call) -> tuple[Callable[[torch.Tensor], torch.Tensor], Angles]:
    """What puts rows in the order of the sequence into that of the lanes, or the other way round; and the angles."""
    turn = call.to_lanes if angles.in_sequence else call.to_sequence
    return turn, Angles.of(*map(turn, angles.rows), call.num_text, not angles.in_sequence)


def _merged(whole: Call, hidden, x, angles: Angles, call: Call, stopped, passed) -> torch.Tensor:
    """The rows of `call`, which began as `whole`, in the shape of `hidden`; rows that left have the value they had
    then."""
    if angles.in_sequence and call is whole and call.has_every_column:
        return x.view(hidden.shape)
    x = call.to_lanes(x) if angles.in_sequence else x
    if passed:
        x, rows = x[: whole.num_text], x[whole.num_text :] if stopped is None else stopped
        for before, kept in reversed(passed):
            rows = before.index_copy(0, kept, rows)
        stopped = rows
    return whole.merge(hidden, x, stopped)
