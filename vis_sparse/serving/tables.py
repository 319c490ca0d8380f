"""Where the keys of text lie in the paged cache of a layer that has no visual keys. Pure arrays.

A kernel reads the first n slots of a list of blocks. In a TEXT layer the visual slots between two runs of text hold
nothing and must not be read.

- Layout B ("blocks"): a text token keeps its own slot, and the block list leaves whole visual blocks out. Where a run
  of text begins inside a block, the block's head, whose slots belong to visual tokens, is filled with the end of the
  run before: then block after block is full. So the content of a block is a function of the tokens up to its end, as in
  an unmodified engine, and prefixes can be shared. It needs every run of visual tokens to be whole blocks long.
- Layout A ("compact"): the i-th text token goes to slot i. Always possible, but a block's content depends on more than
  the prefix it is hashed by, so such a request must share no prefix with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .kinds import TEXT
from .step import FAR, Batch, Sequences, Step


def fits_blocks(segments: Sequence[tuple[int, int]], block: int) -> bool:
    """Whether a prompt of these (start, length) segments can use layout B with blocks of `block` slots."""
    return all(length % block == 0 for _, length in segments)


def empty_columns(segments: Sequence[tuple[int, int]], block: int) -> list[int]:
    """Layout B: columns of a prompt's block table that hold nothing in a TEXT layer.

    The block in which an image begins holds the text before it, the one in which it ends text after it.
    """
    return [column for start, length in segments for column in range(-(-start // block), (start + length) // block)]


def text_tokens(segments: Sequence[tuple[int, int]], count: int) -> int:
    """How many of a prompt's first `count` tokens are text: as many slots does layout A fill."""
    return count - sum(min(max(count - start, 0), length) for start, length in segments)


def blocks_not_held(segments: Sequence[tuple[int, int]], tokens: int, block: int, compact: bool) -> int:
    """Blocks of a prompt of `tokens` tokens that a TEXT layer does without, if it has a block table of its own."""
    if compact:
        return -(-tokens // block) - -(-text_tokens(segments, tokens) // block)
    return len(empty_columns(segments, block))


def block_columns(batch: Batch, sequences: Sequences, block: int, width: int) -> np.ndarray | None:
    """int64 (sequences, width): which column of its request's block table each block of a sequence is.

    None if the tables are the requests' own. Columns beyond a sequence's keys are clipped, never read.
    """
    shifted = (sequences.out > 0) & ~batch.compact[sequences.request]
    if not shifted.any():
        return None
    columns = np.broadcast_to(np.arange(width), (len(sequences.request), width)).copy()
    own = columns[0].copy()
    starts, lengths = batch.starts[sequences.request], batch.lengths[sequences.request]
    before = batch.before[sequences.request]
    for segment in range(starts.shape[1]):
        left_out = shifted & (sequences.run > segment)
        from_block = (starts[:, segment] - before[:, segment]) // block
        jump = np.where(left_out, lengths[:, segment] // block, 0)
        columns += jump[:, None] * (own >= from_block[:, None])
    return np.minimum(columns, width - 1)


@dataclass(frozen=True)
class BlockCopies:
    """Whole blocks to copy between two writes of a layer's keys, all independent: int64 (copies,) each.

    request: whose table. source, target: columns of it.
    """

    request: np.ndarray
    source: np.ndarray
    target: np.ndarray


def head_copies(step: Step, kinds: Sequence[int], block: int) -> list[BlockCopies]:
    """Layout B: the copies that fill the heads of the blocks in which this step's runs of text begin, in order.

    A later one may read what an earlier one wrote, after the step's own keys were written again.
    """
    batch, found = step.batch, []
    wanted = (step.kind(kinds) == TEXT) & ~batch.compact
    for start, end in zip(batch.starts.T, batch.ends.T):
        begins = wanted & (start < FAR) & (step.first <= end) & (end < step.end) & (end % block > 0)
        if begins.any():
            request = np.flatnonzero(begins)
            found.append(BlockCopies(request, start[request] // block, end[request] // block))
    return found


@dataclass(frozen=True)
class CompactSlots:
    """Layout A: which of a layer's query rows have a slot of their own: int64 (moved,) each.

    row: index among the queries. request, column, offset: the block, by its column in the request's table, and the
    place in it.
    """

    row: np.ndarray
    request: np.ndarray
    column: np.ndarray
    offset: np.ndarray


def compact_slots(step: Step, kinds: Sequence[int], rows: np.ndarray | None, block: int) -> CompactSlots | None:
    """Layout A: slots of the query rows `rows` (None: all) of a layer. None if every row keeps its own."""
    wanted = (step.kind(kinds) == TEXT) & step.batch.compact & (step.batch.lengths.sum(1) > 0)
    if not wanted.any():
        return None
    rows = np.arange(step.num_rows) if rows is None else rows
    moved = np.flatnonzero(wanted[step.request[rows]] & (step.out[rows] > 0))
    if not len(moved):
        return None
    chosen = rows[moved]
    place = step.position[chosen] - step.out[chosen]
    return CompactSlots(moved, step.request[chosen], place // block, place % block)
