"""Boxes of a grid: the keys that a tile of queries reads, or the queries that read a tile of keys.

A box is walked in steps of STEP_Y x STEP_X entries: where an entry of a step lies is a constant plus the step's corner,
and that is arithmetic on scalars. No entry costs a division. Steps that lie in the box's *core*, the rectangle in
which every entry meets the whole tile, come first and need no mask. For the others, a place in a frame is one number,
row and column in half a word each, and one subtraction compares both.

Boxes travel as tuples: outer = (first frame, row and column, numbers of frames, rows and columns), core = (first row
and column, numbers of rows and columns; the same in all frames), windows = (first place, last place) of each entry of
the tile.
"""

from __future__ import annotations

import triton
from triton import language as tl

# Sides of a grid must be smaller: row and column share a word, with a guard bit above each.
MOST_SIDE = 2**14
_GUARDS = tl.constexpr(0x80008000 - 2**32)


@triton.jit
def place_of(y, x):
    """Row and column as one number, in the order of the raster."""
    return y * 65536 + x


@triton.jit
def within(place, windows):
    """Whether places lie between the first and the last one of windows, in rows and in columns. A field that is below
    its bound borrows from its guard bit."""
    first, last = windows
    return (~((place - (first - _GUARDS)) & ((last + _GUARDS) - place)) & _GUARDS) == 0


@triton.jit
def keys_of(first, last, side, RADIUS: tl.constexpr, STRIDE: tl.constexpr):
    """On one axis, the keys that any of the queries `first` to `last` reads, and those that all of them read."""
    low, core_high = first // STRIDE * STRIDE - RADIUS, first // STRIDE * STRIDE + STRIDE - 1 + RADIUS
    core_low, high = last // STRIDE * STRIDE - RADIUS, last // STRIDE * STRIDE + STRIDE - 1 + RADIUS
    return tl.maximum(low, 0), tl.minimum(high, side - 1), tl.maximum(core_low, 0), tl.minimum(core_high, side - 1)


@triton.jit
def queries_of(first, last, side, RADIUS: tl.constexpr, STRIDE: tl.constexpr):
    """On one axis, the queries that read any of the keys `first` to `last`, and those that read all of them."""
    low, core_low = tl.maximum(first - RADIUS, 0) // STRIDE * STRIDE, tl.maximum(last - RADIUS, 0) // STRIDE * STRIDE
    core_high, high = (first + RADIUS) // STRIDE * STRIDE + STRIDE - 1, (last + RADIUS) // STRIDE * STRIDE + STRIDE - 1
    return low, tl.minimum(high, side - 1), core_low, tl.minimum(core_high, side - 1)


@triton.jit
def key_box(
    t, y, x, frames, height, width, RADIUS: tl.constexpr, FRAMES: tl.constexpr, STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """The keys that a tile of queries reads: outer and core."""
    y_end, x_end = tl.minimum(y + TILE_Y, height) - 1, tl.minimum(x + TILE_X, width) - 1
    top, bottom, core_top, core_bottom = keys_of(y, y_end, height, RADIUS, STRIDE)
    left, right, core_left, core_right = keys_of(x, x_end, width, RADIUS, STRIDE)
    first, last = tl.maximum(t - FRAMES, 0), tl.minimum(t + FRAMES, frames - 1)
    if CAUSAL:
        last = t
        core_bottom = tl.minimum(core_bottom, y - 1)  # before every query, in the tile's own frame too
        if FRAMES == 0:
            bottom = tl.minimum(bottom, y_end)
    outer = first, top, left, last - first + 1, bottom - top + 1, right - left + 1
    return outer, (core_top, core_left, core_bottom - core_top + 1, core_right - core_left + 1)


@triton.jit
def query_box(
    t, y, x, frames, height, width, RADIUS: tl.constexpr, FRAMES: tl.constexpr, STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """The queries that read a tile of keys: outer and core."""
    y_end, x_end = tl.minimum(y + TILE_Y, height) - 1, tl.minimum(x + TILE_X, width) - 1
    top, bottom, core_top, core_bottom = queries_of(y, y_end, height, RADIUS, STRIDE)
    left, right, core_left, core_right = queries_of(x, x_end, width, RADIUS, STRIDE)
    first, last = tl.maximum(t - FRAMES, 0), tl.minimum(t + FRAMES, frames - 1)
    if CAUSAL:
        first = t
        core_top = tl.maximum(core_top, y_end + 1)
        if FRAMES == 0:
            top = tl.maximum(top, y)
    outer = first, top, left, last - first + 1, bottom - top + 1, right - left + 1
    return outer, (core_top, core_left, core_bottom - core_top + 1, core_right - core_left + 1)


@triton.jit
def key_windows(y, x, height, width, RADIUS: tl.constexpr, STRIDE: tl.constexpr):
    """For each query, the places of the first and the last key of its window."""
    top, bottom, _, _ = keys_of(y, y, height, RADIUS, STRIDE)
    left, right, _, _ = keys_of(x, x, width, RADIUS, STRIDE)
    return place_of(top, left), place_of(bottom, right)


@triton.jit
def query_windows(y, x, height, width, RADIUS: tl.constexpr, STRIDE: tl.constexpr):
    """For each key, the places of the first and the last query that reads it."""
    top, bottom, _, _ = queries_of(y, y, height, RADIUS, STRIDE)
    left, right, _, _ = queries_of(x, x, width, RADIUS, STRIDE)
    return place_of(top, left), place_of(bottom, right)


@triton.jit
def divided(number, divisor):
    """Quotient and remainder of two scalars, exact up to 2^20, without the division of integers."""
    by = tl.maximum(divisor, 1)
    quotient = ((number + 0.5) / (by * 1.0)).to(tl.int32)
    return quotient, number - quotient * by


@triton.jit
def aligned(low, count, core_low, STEP: tl.constexpr):
    """The beginning and length of a side, begun earlier so that its core begins with a step, if that costs no step."""
    shift = (STEP - (core_low - low) % STEP) % STEP
    free = (shift <= low) & (tl.cdiv(count + shift, STEP) == tl.cdiv(count, STEP))
    shift = tl.where(free, shift, 0)
    return low - shift, count + shift


@triton.jit
def steps_of(outer, core, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, HAS_CORE: tl.constexpr):
    """A box in steps: (first frame, row and column, rows and columns of steps); of those in the core (first row, first
    column, rows, columns); how many steps need no mask, and how many there are."""
    t, y, x, depth, rows, columns = outer
    core_y, core_x, core_rows, core_columns = core
    inner = 0, 0, 0, 0
    if HAS_CORE:
        y, rows = aligned(y, rows, core_y, STEP_Y)
        x, columns = aligned(x, columns, core_x, STEP_X)
        first_row, first_column = tl.cdiv(core_y - y, STEP_Y), tl.cdiv(core_x - x, STEP_X)
        inner_rows = tl.maximum((core_y + core_rows - y) // STEP_Y - first_row, 0)
        inner_columns = tl.maximum((core_x + core_columns - x) // STEP_X - first_column, 0)
        inner = first_row, first_column, inner_rows, inner_columns
    rows, columns = tl.cdiv(rows, STEP_Y), tl.cdiv(columns, STEP_X)
    return (t, y, x, rows, columns), inner, depth * inner[2] * inner[3], depth * rows * columns


@triton.jit
def corner(
    index, steps, inner, full, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, HAS_CORE: tl.constexpr, MASKED: tl.constexpr
):
    """Frame, row and column of the first entry of step `index`; the `full` ones in the core come first."""
    t, y, x, rows, columns = steps
    if not HAS_CORE:
        frame, index = divided(index, rows * columns)
        row, column = divided(index, columns)
        return t + frame, y + row * STEP_Y, x + column * STEP_X
    first_row, first_column, inner_rows, inner_columns = inner
    if not MASKED:
        frame, index = divided(index, inner_rows * inner_columns)
        row, column = divided(index, inner_columns)
        return t + frame, y + (first_row + row) * STEP_Y, x + (first_column + column) * STEP_X
    frame, index = divided(index - full, rows * columns - inner_rows * inner_columns)
    # around the core: whole rows above and below it, then what is left of the rows beside it
    strips = (rows - inner_rows) * columns
    beside = index >= strips
    row, column = divided(tl.where(beside, index - strips, index), tl.where(beside, columns - inner_columns, columns))
    row += tl.where(beside, first_row, tl.where(row >= first_row, inner_rows, 0))
    column += tl.where(beside & (column >= first_column), inner_columns, 0)
    return t + frame, y + row * STEP_Y, x + column * STEP_X


@triton.jit
def entries(y, x, height, width, STEP_Y: tl.constexpr, STEP_X: tl.constexpr):
    """Of the entries of a step that begins at (y, x): how many rows of the grid's raster they lie behind its beginning,
    their places, and which of them exist."""
    index = tl.arange(0, STEP_Y * STEP_X)
    down, right = index // STEP_X, index % STEP_X
    exists = (down < height - y) & (right < width - x)
    return y * width + x + (down * width + right), place_of(y, x) + place_of(down, right), exists
