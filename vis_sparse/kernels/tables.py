"""Tables that the Triton kernels walk: runs of key slots, blocks of queries and of keys, segments and their tiles.

A run is a stretch of slots of one sample whose tokens are real, follow each other in the sequence, and are all text
or all visual. Within a run the column is the slot plus a constant, so that causality needs no table of columns: a
query at column c reads the first `c - first_column + 1` slots of it. A prompt has one run a segment and one a stretch
of text between segments, whatever its length.

All tables are int32; they are made on the host once per pattern and configuration and kept on the device. Blocks and
tiles are in the order in which their programs start: those with most to walk first, so that none of them is the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..layout.packing import Coordinates, on_device
from ..plans.layer_plan import Neighborhood
from .patterns import TextPattern, VisualPattern
from .tilings import best_tiling

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
    `RunTables`. sides: of tiles and of the steps in which their boxes are walked (`Tiling.sides`). pairs: query-key
    pairs of one head in the boxes that are walked.
    """

    tiles: torch.Tensor
    segments: torch.Tensor
    runs: torch.Tensor
    sides: tuple[int, ...]
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
    walked = np.zeros(len(blocks), dtype=np.int64)
    for index, (sample, _, _, _, last) in enumerate(blocks):
        _, lengths, first_columns, _ = runs[offsets[sample] : offsets[sample + 1]].T
        walked[index] = np.clip(last - first_columns + 1, 0, lengths).sum()
    blocks = np.array(blocks, dtype=np.int64).reshape(-1, 5)
    pairs = int((blocks[:, 2] * walked).sum())
    blocks = _most_first(blocks, walked)
    return RunTables(*(_table(t, device) for t in (columns, blocks, offsets, runs)), pairs)


def _most_first(programs: np.ndarray, work: np.ndarray) -> np.ndarray:
    """Rows in falling order of work; equal ones stay next to each other, since they read the same keys."""
    return programs[np.argsort(-work, kind="stable")]


def key_blocks(pattern: Pattern, block: int) -> torch.Tensor:
    """Blocks of at most `block` keys with the queries that read them, for the gradients of keys and values.

    (blocks, 7): sample, first slot, keys, first column, is visual, and the packed query rows that read them: from the
    first row up to the end of the sample. Under a neighbourhood of visual runs only those have blocks that no tile of
    keys covers, and rows are those of the segments behind a text run. What nobody reads (padding, segments of earlier
    calls) has blocks without rows: their gradients are written all the same.
    """
    offsets, runs = _runs(pattern.slots)
    columns, found = _columns(pattern), []
    near = isinstance(getattr(pattern, "attention", None), Neighborhood)
    for sample, (first, count) in enumerate(_query_rows(pattern)):
        own = columns[first : first + count]
        unread = ~pattern.slots.valid[sample]
        if near:
            visual = pattern.slots.is_visual[sample]
            unread |= visual & ~np.isin(pattern.slots.segment[sample], pattern.query.segment[first : first + count])
        for slot, length, column, is_visual in runs[offsets[sample] : offsets[sample + 1]]:
            if near and is_visual:
                continue
            for start in range(0, length, block):
                row = first + np.searchsorted(own, column + start)
                size = min(block, length - start)
                found.append((sample, slot + start, size, column + start, is_visual, row, first + count))
        for slot, length in _stretches(unread):
            for start in range(0, length, block):
                found.append((sample, slot + start, min(block, length - start), 0, 0, first, first))
    found = np.array(found, dtype=np.int64).reshape(-1, 7)
    return _table(_most_first(found, found[:, 6] - found[:, 5]), pattern.device)


def _stretches(chosen: np.ndarray) -> list[tuple[int, int]]:
    """First index and length of every stretch of True."""
    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2], edges[1::2] - edges[::2]))


def near_tables(pattern: VisualPattern, positions: int, keys: int) -> NearTables:
    """For a neighbourhood, in tiles of `positions` queries and steps of `keys` (powers of two)."""
    segments, runs = _segments(pattern)
    tiling = best_tiling(pattern.attention, segments, runs, positions, keys)
    tiles = _most_first(grid_tiles(segments, tiling.tile), tiling.entries)
    tables = (_table(t, pattern.device) for t in (tiles, segments, runs))
    return NearTables(*tables, tiling.sides, positions * int(tiling.entries.sum()))


def key_tiles(pattern: VisualPattern, positions: int, queries: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Tiles of `positions` keys, (tiles, 4) as in `NearTables`, and the sides of tiles and of steps of `queries`."""
    segments, runs = _segments(pattern)
    tiling = best_tiling(pattern.attention, segments, runs, positions, queries, of_keys=True)
    tiles = _most_first(grid_tiles(segments, tiling.tile), tiling.entries)
    return _table(tiles, pattern.device), tiling.sides


def grid_tiles(segments: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """(tiles, 4): segment, frame, first row, first column of every tile of every grid."""
    found = [np.zeros((0, 4), dtype=np.int64)]
    for index, (frames, height, width) in enumerate(segments[:, 3:6]):
        axes = np.arange(frames), np.arange(0, height, sides[0]), np.arange(0, width, sides[1])
        t, y, x = np.meshgrid(*axes, indexing="ij")
        found.append(np.stack([np.full(t.size, index), t.ravel(), y.ravel(), x.ravel()], axis=1))
    return np.concatenate(found)


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
