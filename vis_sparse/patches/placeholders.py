"""Families whose processor puts one placeholder token in `input_ids` for each visual token.

`generate` runs the vision encoder first and hands its output over instead of pixels and sizes; so the encoder methods
of a patched model note the grids on what they return.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from ..executor.transformers_internals import note, noted_grids
from ..layout.layout import LayoutError, VisualLayout
from .before import listening
from .family import Family, bound, fits, one
from .scopes import held
from .tower import TowerKind

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Visual:
    """One modality. pixels: the argument that holds its pixels. grids(outer, arguments): (frames, height, width) in
    tokens of every segment, in the order of the placeholders; arguments are those of a call of the outer model or of
    its encoder."""

    pixels: str
    grids: Callable[[nn.Module, dict], list[Grid]]


def family(
    *classes: str,
    check: Callable[[nn.Module], None] = fits,
    towers: tuple[TowerKind, ...] = (),
    merge: Callable[[nn.Module], int] = one,
    not_before: Mapping[str, str] | None = None,
    **visuals: Visual,
) -> Family:
    """The family of `classes` with its modalities by transformers' names: image=, video=.

    Placeholders are the config's `image_token_id`, `video_token_id`; encoders `get_image_features`, ...
    """
    methods = {
        f"get_{name}_features": functools.partial(_note, visual, name) for name, visual in visuals.items()
    }
    of_class = {"check": check, "towers": towers, "merge": merge, "not_before": not_before or {}}
    return Family(classes, functools.partial(_read_layout, visuals), methods, **of_class)


def _read_layout(visuals: dict[str, Visual], outer, arguments: dict, past: int) -> VisualLayout | None:
    input_ids = arguments.get("input_ids")
    if input_ids is None:
        return None
    samples = [[] for _ in range(input_ids.shape[0])]
    for name, visual in visuals.items():
        grids = _grids(visual, name, outer, arguments)
        if not grids:
            continue
        columns = _columns(input_ids == getattr(outer.config, f"{name}_token_id"))
        for sample, placed in zip(samples, _place(columns, grids, name), strict=True):
            sample += [(start + past, grid, name) for start, grid in placed]
    return VisualLayout.from_grids(samples)


def _grids(visual: Visual, name: str, outer, arguments: dict) -> list[Grid]:
    encoded = (arguments.get("mm_encoder_outputs") or {}).get(name)
    if encoded is None:
        return [] if arguments.get(visual.pixels) is None else visual.grids(outer, arguments)
    grids = noted_grids(encoded)
    if grids is None:
        raise LayoutError(
            f"mm_encoder_outputs: got {name} features that do not tell their grids, expected those of the patched "
            f"model's get_{name}_features, whole (prefill_chunk_size=None)"
        )
    return grids


def _columns(is_placeholder) -> list[np.ndarray]:
    return [np.flatnonzero(row) for row in is_placeholder.cpu().numpy()]


def _place(columns: list[np.ndarray], grids: list[Grid], name: str) -> list[list[tuple[int, Grid]]]:
    """(first column, grid) of every grid, sample by sample."""
    found, size = sum(map(len, columns)), sum(map(_size, grids))
    if found == 0:
        return [[] for _ in columns]
    if found % size or len(columns) % (found // size):
        raise LayoutError(
            f"input_ids: got {found} {name} tokens, expected a multiple of {size} (the tokens of the call's "
            f"{len(grids)} {name} grids)"
        )
    # beams and several answers repeat each sample in place, and the features with it
    times = found // size
    left, placed = iter(grids), []
    for index, sample in enumerate(columns[::times]):
        placed.append([])
        while len(sample):
            grid = next(left)
            run = sample[: _size(grid)]
            if len(run) < _size(grid) or run[-1] - run[0] + 1 != len(run):
                raise LayoutError(
                    f"input_ids: sample {index * times}: got {len(run)} {name} tokens between columns {run[0]} and "
                    f"{run[-1]}, expected a grid of {grid[0]}x{grid[1]}x{grid[2]} tokens in a row"
                )
            placed[-1].append((int(run[0]), grid))
            sample = sample[len(run) :]
    return [sample for sample in placed for _ in range(times)]


def _size(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _note(visual: Visual, name: str, state, plain: Callable, *args, **kwargs):
    """The encoder method of a modality, which notes on its output the grids of what it encoded, and what the tower said
    of their tokens."""
    wants_tuple = kwargs.get("return_dict") is False
    with listening() as said:
        output = plain(*args, **(kwargs | {"return_dict": True} if wants_tuple else kwargs))
    said = np.concatenate(said) if said else None
    if said is not None and state.running is not None:
        state.running.said[name] = said
    method = getattr(type(state.outer), f"get_{name}_features")
    # `generate` hands the output on, and hooks of accelerate hand on a copy
    travels = held(state.text_model, "generating") is not None
    grids = visual.grids(state.outer, bound(method, state.outer, args, kwargs))
    note(output, grids, said, travels and not wants_tuple)
    return output.to_tuple() if wants_tuple else output
