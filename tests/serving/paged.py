"""A paged cache of token identities with prefix sharing, chunks and preemption, as engines keep it: what layouts are
checked on. A key is named by all tokens up to it, so that a wrong, stale or shared-in-error key never looks right."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vis_sparse.serving.kinds import ALL, READ, TEXT
from vis_sparse.serving.step import Batch, Step, merged_segments
from vis_sparse.serving.tables import block_columns, compact_slots, empty_columns, fits_blocks, head_copies, text_tokens

STALE = -1


@dataclass
class Request:
    tokens: tuple  # negative: visual
    plan: int
    compact: bool = False
    salt: object = None
    blocks: list = field(default_factory=list)
    done: int = 0

    @property
    def segments(self):
        return merged_segments((i, i) for i, token in enumerate(self.tokens) if token < 0)

    def key(self, end: int):
        return (self.plan, self.salt, self.tokens[:end])


class Cache:
    """One layer's blocks. kinds: of the layer, by plan."""

    def __init__(self, block: int, kinds: tuple, blocks: int = 4000):
        self.block, self.kinds = block, kinds
        self.slots = np.full((blocks, block), STALE, np.int64)
        self.names: dict = {}
        self.shared: dict = {}
        self.next = 1

    def name(self, request: Request, position: int) -> int:
        return self.names.setdefault(request.key(position + 1), len(self.names))

    def admit(self, request: Request) -> None:
        """Take the blocks that earlier requests left, at most to the last token but one."""
        request.blocks, request.done = [], 0
        for end in range(self.block, len(request.tokens), self.block):
            if request.key(end) not in self.shared:
                break
            request.blocks.append(self.shared[request.key(end)])
            request.done = end

    def step(self, requests: list[Request], counts: list[int]) -> None:
        """Run `counts` tokens of each request, and check what every query reads."""
        for request, count in zip(requests, counts):
            while len(request.blocks) * self.block < request.done + count:
                request.blocks.append(self.next)
                self.next += 1
        batch = Batch.of(
            [request.segments for request in requests],
            [request.plan for request in requests],
            [request.compact for request in requests],
        )
        lengths = np.array([request.done + count for request, count in zip(requests, counts)])
        step = Step(batch, np.concatenate([[0], np.cumsum(counts)]), lengths)
        width = max(len(request.blocks) for request in requests) + 1
        table = np.zeros((len(requests), width), np.int64)
        for row, request, count in zip(table, requests, counts):
            row[: len(request.blocks)] = request.blocks
            self._give_back(row, request, request.done + count)
        self._check_rows(step, requests)
        sequences = step.sequences(self.kinds)
        rows = np.arange(step.num_rows) if sequences.rows is None else sequences.rows
        own = table[step.request, step.position // self.block] * self.block + step.position % self.block
        written = step.rows_of(self.kinds, READ)
        self._write(own[written], step, written, requests)
        slots = own[rows]
        moved = compact_slots(step, self.kinds, sequences.rows, self.block)
        if moved is not None:
            slots[moved.row] = table[moved.request, moved.column] * self.block + moved.offset
        self._write(slots, step, rows, requests)
        for copies in head_copies(step, self.kinds, self.block):
            source, target = table[copies.request, copies.source], table[copies.request, copies.target]
            assert (source > 0).all() and (target > 0).all()
            self.slots[target] = self.slots[source]
            self._write(slots, step, rows, requests)
        columns = block_columns(batch, sequences, self.block, width)
        tables = table[sequences.request] if columns is None else table[sequences.request[:, None], columns]
        self._check_reads(sequences, tables, rows, step, requests)
        assert (self.slots[0] == STALE).all()
        for request, count in zip(requests, counts):
            request.done += count
            for end in range(self.block, request.done + 1, self.block):
                self.shared.setdefault(request.key(end), request.blocks[end // self.block - 1])

    def _give_back(self, row, request: Request, tokens: int) -> None:
        """Block 0, in which nothing is ever written, where a request needs none."""
        if self.kinds[request.plan] == TEXT:
            if request.compact:
                row[-(-text_tokens(request.segments, tokens) // self.block) :] = 0
            else:
                row[[column for column in empty_columns(request.segments, self.block) if column < len(row)]] = 0

    def _check_rows(self, step: Step, requests: list[Request]) -> None:
        tokens = [requests[r].tokens[p] for r, p in zip(step.request, step.position)]
        assert step.visual.tolist() == [token < 0 for token in tokens]
        assert step.has_visual == any(token < 0 for token in tokens)
        assert step.visual_plans == {requests[r].plan for r, token in zip(step.request, tokens) if token < 0}

    def _write(self, slots, step: Step, rows, requests) -> None:
        for slot, row in zip(slots, rows):
            self.slots.flat[slot] = self.name(requests[step.request[row]], step.position[row])

    def _check_reads(self, sequences, tables, rows, step: Step, requests) -> None:
        query = 0
        for index, (request, first, end, keys) in enumerate(
            zip(sequences.request, sequences.first, sequences.end, sequences.keys)
        ):
            owner = requests[request]
            kind = self.kinds[owner.plan]
            read = self.slots[tables[index]].reshape(-1)
            for position in range(first, end):
                assert (step.request[rows[query]], step.position[rows[query]]) == (request, position)
                assert (kind == ALL) or owner.tokens[position] >= 0
                got = sorted(read[: keys - (end - 1 - position)].tolist())
                places = [p for p in range(position + 1) if kind != TEXT or owner.tokens[p] >= 0]
                assert got == sorted(self.name(owner, p) for p in places), (owner.tokens, position, kind)
                query += 1
        assert query == len(rows)
        expected = [i for i in range(step.num_rows) if not step.visual[i] or self.kinds[step.plan[i]] == ALL]
        assert rows.tolist() == expected


def layout_of(request: Request, block: int, index: int) -> Request:
    """The layout that its images allow; in layout A it shares with nobody."""
    if not fits_blocks(request.segments, block):
        request.compact, request.salt = True, index
    return request
