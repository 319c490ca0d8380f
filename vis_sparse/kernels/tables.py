"""Tables that the Triton kernels walk: runs of key slots, blocks of queries and of keys, segments and their tiles.

A run is a stretch of slots of one sample whose tokens are real, follow each other in the sequence, and are all text
or all visual. Within a run the column is the slot plus a constant, so that causality needs no table of columns: a
query at column c reads the first `c - first_column + 1` slots of it. A prompt has one run a segment and one a stretch
of text between segments, whatever its length.

All tables are int32; they are made on the host once per pattern and configuration and kept on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..layout.packing import Coordinates, on_device
from ..plans.layer_plan import Neighborhood
from .patterns import TextPattern, VisualPattern, window

Pattern = TextPattern | VisualPattern


@dataclass(frozen=True)
class RunTables:
    """What `runs` kernels walk.

    columns: (rows,) column of every query row. blocks: (blocks, 5) sample, first row, rows, and first and last column
    of every block of queries. offsets: (samples + 1,) where each sample's runs begin. runs: (runs, 4) first slot,
    length, first column, is visual. pairs: query-key pairs of one head that the blocks walk.
    """

    columns: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    runs: torch.Tensor
    pairs: int


@dataclass(frozen=True)
class NearTables:
    """What the forward kernel of neighbourhoods walks.

    tiles: (tiles, 4) segment, frame, first row and column of every tile of queries. segments: (segments, 8) sample,
    first packed row, first slot, frames, height, width, and the range of its text runs. runs: text runs, as in
    `RunTables`. sides: height and width of a tile. pairs: query-key pairs of one head in the tiles that are walked.
    """

    tiles: torch.Tensor
    segments: torch.Tensor
    runs: torch.Tensor
    sides: tuple[int, int]
    pairs: int


def run_tables(pattern: Pattern, block: int) -> RunTables:
    """For causal attention by column, in blocks of `block` queries."""
    rows, columns, device = _query_rows(pattern), _columns(pattern), pattern.device
    offsets, runs = _runs(pattern.slots)
    blocks = []
    for sample, (first, count) in enumerate(rows):
        for start in range(first, first + count, block):
            own = columns[start : min(start + block, first + count)]
            blocks.append((sample, start, len(own), own.min(), own.max()))
    pairs = 0
    for sample, _, count, _, last in blocks:
        _, lengths, first_columns, _ = runs[offsets[sample] : offsets[sample + 1]].T
        pairs += count * int(np.clip(last - first_columns + 1, 0, lengths).sum())
    return RunTables(*(_table(t, device) for t in (columns, np.array(blocks).reshape(-1, 5), offsets, runs)), pairs)


def key_blocks(pattern: Pattern, block: int) -> torch.Tensor:
    """Blocks of at most `block` keys with the queries that read them, for the gradients of keys and values.

    (blocks, 7): sample, first slot, keys, first column, is visual, and the packed query rows that read them: from the
    first row up to the end of the sample. Under a neighbourhood only text runs have blocks, and rows are those of the
    segments behind them.
    """
    offsets, runs = _runs(pattern.slots)
    columns, found = _columns(pattern), []
    near = isinstance(getattr(pattern, "attention", None), Neighborhood)
    for sample, (first, count) in enumerate(_query_rows(pattern)):
        own = columns[first : first + count]
        for slot, length, column, is_visual in runs[offsets[sample] : offsets[sample + 1]]:
            if near and is_visual:
                continue
            for start in range(0, length, block):
                row = first + np.searchsorted(own, column + start)
                size = min(block, length - start)
                found.append((sample, slot + start, size, column + start, is_visual, row, first + count))
    return _table(np.array(found).reshape(-1, 7), pattern.device)


def near_tables(pattern: VisualPattern, positions: int) -> NearTables:
    """For a neighbourhood, in tiles of `positions` queries (a power of two)."""
    segments, runs = _segments(pattern)
    sides = _best_sides(pattern.attention, segments, runs, positions)
    tables = (_table(t, pattern.device) for t in (grid_tiles(segments, sides), segments, runs))
    return NearTables(*tables, sides, _walked(pattern.attention, segments, runs, sides))


def key_tiles(pattern: VisualPattern, positions: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Tiles of `positions` keys, (tiles, 4) as in `NearTables`, and their sides."""
    segments, runs = _segments(pattern)
    sides = _best_sides(pattern.attention, segments, runs, positions)
    return _table(grid_tiles(segments, sides), pattern.device), sides


def _best_sides(near: Neighborhood, segments, runs, positions: int) -> tuple[int, int]:
    """Height and width, powers of two, of the tiles of `positions` that walk the fewest pairs; square ones first."""
    shapes = [(1 << i, positions >> i) for i in range(positions.bit_length())]
    return min(shapes, key=lambda sides: (_walked(near, segments, runs, sides), abs(sides[0] - sides[1])))


def grid_tiles(segments: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """(tiles, 4): segment, frame, first row, first column of every tile of every grid."""
    found = [np.zeros((0, 4), dtype=np.int64)]
    for index, (frames, height, width) in enumerate(segments[:, 3:6]):
        axes = np.arange(frames), np.arange(0, height, sides[0]), np.arange(0, width, sides[1])
        t, y, x = np.meshgrid(*axes, indexing="ij")
        found.append(np.stack([np.full(t.size, index), t.ravel(), y.ravel(), x.ravel()], axis=1))
    return np.concatenate(found)


def _walked(near: Neighborhood, segments, runs, sides) -> int:
    """Pairs of one head: every tile, whole, over the text before it and the box of keys its windows cover."""
    total = 0
    for _, _, _, frames, height, width, low, high in segments:
        text = int(runs[low:high, 1].sum())
        rows = _box_sides(near, height, sides[0], near.direction == "causal" and near.frames == 0)
        columns = _box_sides(near, width, sides[1], False)
        t = np.arange(frames)
        last = t if near.direction == "causal" else np.minimum(t + near.frames, frames - 1)
        boxes = (last - np.maximum(t - near.frames, 0) + 1).sum() * rows.sum() * columns.sum()
        total += sides[0] * sides[1] * (int(boxes) + frames * len(rows) * len(columns) * text)
    return int(total)


def _box_sides(near: Neighborhood, side: int, tile: int, up_to_query: bool) -> np.ndarray:
    """How many keys the box of each tile spans along one axis."""
    first = np.arange(0, side, tile)
    last = np.minimum(first + tile, side) - 1
    low, _ = window(near, first, side)
    _, high = window(near, last, side)
    high = last if up_to_query else np.minimum(high, side - 1)
    return high - np.maximum(low, 0) + 1


def _segments(pattern: VisualPattern) -> tuple[np.ndarray, np.ndarray]:
    """(segments, 8) and the text runs of all samples."""
    query, slots = pattern.query, pattern.slots
    text = slots._replace(valid=slots.valid & ~slots.is_visual)
    offsets, runs = _runs(text)
    heads = np.flatnonzero(np.diff(query.segment, prepend=-1))
    sizes = np.diff(np.append(heads, len(query.segment)))
    found = []
    for row, size in zip(heads, sizes):
        q = query.take(row)
        own = np.flatnonzero(slots.valid[q.sample] & (slots.segment[q.sample] == q.segment))
        low, high = offsets[q.sample], offsets[q.sample + 1]
        before = low + np.searchsorted(runs[low:high, 2], q.column)
        frames = size // (q.height * q.width)
        found.append((q.sample, row, own[0], frames, q.height, q.width, low, before))
    return np.array(found, dtype=np.int64).reshape(-1, 8), runs


def _runs(slots: Coordinates) -> tuple[np.ndarray, np.ndarray]:
    """(samples + 1,) offsets and (runs, 4) runs in the order of slots."""
    valid, column, visual = slots.valid, slots.column, slots.is_visual
    follows = np.zeros_like(valid)
    follows[:, 1:] = valid[:, :-1] & (column[:, 1:] == column[:, :-1] + 1) & (visual[:, 1:] == visual[:, :-1])
    begins = valid & ~follows
    sample, slot = np.nonzero(begins)
    lengths = np.bincount(np.cumsum(begins.ravel())[valid.ravel()] - 1, minlength=len(slot))
    offsets = np.searchsorted(sample, np.arange(len(valid) + 1))
    return offsets, np.stack([slot, lengths, column[begins], visual[begins]], axis=1).astype(np.int64)


def _columns(pattern: Pattern) -> np.ndarray:
    return pattern.query_columns.ravel() if isinstance(pattern, TextPattern) else pattern.query.column


def _query_rows(pattern: Pattern) -> list[tuple[int, int]]:
    """(first row, rows) of every sample."""
    if isinstance(pattern, TextPattern):
        samples, count = pattern.query_columns.shape
        return [(sample * count, count) for sample in range(samples)]
    samples = len(pattern.slots.sample)
    ends = np.searchsorted(pattern.query.sample, np.arange(samples + 1))
    return [(int(first), int(last - first)) for first, last in zip(ends[:-1], ends[1:])]


def _table(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return on_device(array.astype(np.int32), device)
