"""The rows of one step of the engine: which are visual, and which sequences the others form in a layer.

Pure arrays: nothing here knows an engine or a tensor. Rows are numbered as the engine lays them out, request after
request, positions ascending. Work is done for all requests at once; loops run over the images of a prompt only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .kinds import ALL, TEXT, LayerKinds

FAR = np.iinfo(np.int32).max  # a position that no prompt has


def merged_segments(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, length) of the runs of visual tokens of one prompt, from inclusive (first, last) ranges in any order.

    Ranges that touch are one run: no text lies between them.
    """
    runs: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], last + 1 - runs[-1][0])
        else:
            runs.append((first, last + 1 - first))
    return runs


@dataclass(frozen=True)
class Batch:
    """What is fixed about the requests of a batch while it stays together.

    starts, lengths: int64 (requests, most segments), FAR and 0 where a request has fewer. plans: int64 (requests,),
    indices into the loaded plans. compact: bool (requests,), layout A (see `tables`), else layout B.
    """

    starts: np.ndarray
    lengths: np.ndarray
    plans: np.ndarray
    compact: np.ndarray

    @classmethod
    def of(cls, segments: Sequence[Sequence[tuple[int, int]]], plans: Sequence[int], compact: Sequence[bool]) -> Batch:
        most = max((len(each) for each in segments), default=0)
        starts = np.full((len(segments), most), FAR, np.int64)
        lengths = np.zeros((len(segments), most), np.int64)
        for index, each in enumerate(segments):
            if each:
                starts[index, : len(each)], lengths[index, : len(each)] = np.array(each, np.int64).T
        return cls(starts, lengths, np.array(plans, np.int64), np.array(compact, bool))

    @property
    def ends(self) -> np.ndarray:
        return self.starts + self.lengths

    @cached_property
    def before(self) -> np.ndarray:
        """int64 (requests, segments + 1): visual tokens before each run of text."""
        return np.pad(np.cumsum(self.lengths, axis=1), ((0, 0), (1, 0)))


@dataclass(frozen=True)
class Sequences:
    """The query sequences of a layer in a step, in the order of their rows.

    request, run: int64 (sequences,): whose, and after how many segments of its prompt. first, end: positions of the
    queries. keys: how many keys the last query reads, itself included. out: visual tokens that are left out before it
    (0 but in TEXT layers). rows: int64 rows of the step that are queries, or None for all.
    """

    request: np.ndarray
    run: np.ndarray
    first: np.ndarray
    end: np.ndarray
    out: np.ndarray
    rows: np.ndarray | None

    @property
    def keys(self) -> np.ndarray:
        return self.end - self.out

    @property
    def query_start(self) -> np.ndarray:
        """int32 (sequences + 1,): first row of each sequence among the queries, and their number."""
        return np.concatenate([[0], np.cumsum(self.end - self.first)]).astype(np.int32)


class Step:
    """One step: `query_start` (requests + 1,) rows of each request, `lengths` (requests,) tokens after the step."""

    def __init__(self, batch: Batch, query_start: np.ndarray, lengths: np.ndarray):
        self.batch = batch
        self.end = lengths.astype(np.int64)
        self.counts = np.diff(query_start).astype(np.int64)
        self.first = self.end - self.counts
        self.num_rows = int(query_start[-1])

    @cached_property
    def has_visual(self) -> bool:
        """Whether a row of the step is visual. Cheap: decode steps ask no more."""
        batch = self.batch
        return bool(((batch.starts < self.end[:, None]) & (batch.ends > self.first[:, None])).any())

    @cached_property
    def request(self) -> np.ndarray:
        """int64 (rows,): whose row."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def position(self) -> np.ndarray:
        """int64 (rows,): place in its prompt (not what rotary embeddings count)."""
        begins = np.cumsum(self.counts) - self.counts
        return np.arange(self.num_rows) + (self.first - begins)[self.request]

    @cached_property
    def visual(self) -> np.ndarray:
        """bool (rows,)."""
        found = np.zeros(self.num_rows, bool)
        if self.has_visual:
            for start, end in zip(self.batch.starts.T, self.batch.ends.T):
                found |= (self.position >= start[self.request]) & (self.position < end[self.request])
        return found

    @cached_property
    def out(self) -> np.ndarray:
        """int64 (rows,): visual tokens before the row in its prompt."""
        before = np.zeros(self.num_rows, np.int64)
        for end, length in zip(self.batch.ends.T, self.batch.lengths.T):
            before += length[self.request] * (self.position >= end[self.request])
        return before

    @cached_property
    def plan(self) -> np.ndarray:
        """int64 (rows,): the plan of the row's request."""
        return self.batch.plans[self.request]

    @cached_property
    def visual_plans(self) -> frozenset[int]:
        """Plans of the requests whose visual rows are in the step."""
        return frozenset(self.plan[self.visual].tolist()) if self.has_visual else frozenset()

    def kind(self, kinds: Sequence[int]) -> np.ndarray:
        """int64 (requests,): ALL, READ or TEXT in a layer of these kinds."""
        return np.asarray(kinds, np.int64)[self.batch.plans]

    def rows_of(self, kinds: Sequence[int], kind: int) -> np.ndarray:
        """int64: visual rows of requests of a kind."""
        return np.flatnonzero(self.visual & (np.asarray(kinds)[self.plan] == kind))

    def sequences(self, kinds: Sequence[int]) -> Sequences:
        """The query sequences of a layer of these kinds: a request's text rows, one sequence for each run between its
        images; all of its rows as one sequence where visual rows are queries too."""
        batch, kind = self.batch, self.kind(kinds)
        requests, most = batch.starts.shape
        edge = np.full((requests, 1), FAR)
        first = np.maximum(np.concatenate([0 * edge, batch.ends], axis=1), self.first[:, None])
        end = np.minimum(np.concatenate([batch.starts, edge], axis=1), self.end[:, None])
        whole = kind == ALL
        first[whole], end[whole] = FAR, 0
        first[whole, 0], end[whole, 0] = self.first[whole], self.end[whole]
        request, run = np.nonzero(first < end)
        out = np.where(kind[request] == TEXT, batch.before[request, run], 0)
        rows = None
        if self.has_visual:
            rows = np.flatnonzero(~self.visual | whole[self.request])
        return Sequences(request, run, first[request, run], end[request, run], out, rows)

    def ffn_groups(self, layer: LayerKinds, ffn_size: int) -> list[tuple[int | tuple[int, ...], np.ndarray | None]]:
        """(neurons, rows) of the FFN: text rows use all neurons, visual rows those of their plan; None: all rows."""
        groups = {ffn_size: [~self.visual]}
        for plan in self.visual_plans:
            neurons = layer.neurons[plan]
            if neurons != 0:
                groups.setdefault(neurons, []).append(self.visual & (self.plan == plan))
        found = []
        for neurons, masks in groups.items():
            mask = np.logical_or.reduce(masks)
            if mask.any():
                found.append((neurons, None if mask.all() else np.flatnonzero(mask)))
        return found
