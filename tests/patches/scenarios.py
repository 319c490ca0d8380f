"""What is done with every family: the columns of the parity table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image

from vis_sparse.layout.layout import VisualLayout

from .cases import Case, Visual
from .processors import WORDS, tokenizer

FIRST, SECOND, VIDEO = "first picture", "second picture", "video"


@dataclass(frozen=True)
class Scenario:
    """samples: a number is a run of words. run: prefill (one call), greedy, beams, or second turn (on a kept cache)."""

    samples: tuple
    run: str = "prefill"
    padding: str = "left"

    @property
    def has_video(self) -> bool:
        return any(VIDEO in sample for sample in self.samples)


SCENARIOS = {
    "prefill": Scenario(((3, FIRST, 4),)),
    "greedy": Scenario(((3, FIRST, 4),), "greedy"),
    "beams": Scenario(((3, FIRST, 4), (2, SECOND, 6)), "beams"),
    "left padding": Scenario(((5, FIRST, 4), (2, SECOND, 2)), "greedy"),
    "right padding": Scenario(((5, FIRST, 4), (2, SECOND, 2)), padding="right"),
    "two images": Scenario(((2, FIRST, 1, SECOND, 3),), "greedy"),
    "no image": Scenario(((9,), (6,)), "greedy"),
    "mixed batch": Scenario(((3, FIRST, 2, SECOND, 4), (5,), (2, SECOND, 3)), "greedy"),
    "video": Scenario(((2, VIDEO, 3), (1, FIRST, 2, VIDEO, 4)), "greedy"),
    "second turn": Scenario(((3, FIRST, 4),), "second turn"),
}


@dataclass(frozen=True)
class Request:
    """inputs: as the processor makes them. layout: worked out by hand, from the grids that the case names."""

    inputs: dict
    layout: VisualLayout


def make_request(case: Case, scenario: Scenario, dtype: torch.dtype, seed: int = 1) -> Request:
    rng = np.random.default_rng(seed)
    texts, grids = [], []
    images, videos = [], []  # images: those of each sample that has any
    for sample in scenario.samples:
        words, placed, shown = [], [], []
        pictures = sum(part in (FIRST, SECOND) for part in sample)
        for part in sample:
            if isinstance(part, int):
                words += [f"w{i}" for i in rng.integers(0, WORDS, part)]
            elif part == VIDEO:
                frames, width, height = case.video.size
                videos.append(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8))
                words.append(case.video_text)
                placed += case.video.grids
            else:
                visual = case.pictures[part == SECOND]
                shown.append(Image.fromarray(rng.integers(0, 256, (*visual.size[::-1], 3), dtype=np.uint8)))
                words.append(case.image_text)
                placed += _grids(visual, pictures)
        texts.append(" ".join(words))
        images += [shown] if shown else []
        grids.append(placed)
    given = {"images": images} if images else {}
    if videos:
        timing = [dict(fps=1, total_num_frames=len(video), frames_indices=list(range(len(video)))) for video in videos]
        given |= dict(videos=videos, video_metadata=timing)
    processor = _processor(case, scenario.padding)
    inputs = processor(text=texts, padding=True, return_tensors="pt", **given)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return Request(inputs, _layout(case, inputs["input_ids"], grids))


@cache
def _processor(case: Case, padding: str):
    return case.processor(tokenizer(padding))


def _grids(visual: Visual, pictures: int):
    return visual.grids if pictures == 1 or visual.among_others is None else visual.among_others


def _layout(case: Case, input_ids, grids) -> VisualLayout:
    """The grids of every sample, one after the other on its placeholders."""
    placed = []
    for row, wanted in zip(input_ids.tolist(), grids, strict=True):
        columns = [column for column, token in enumerate(row) if token in case.placeholders]
        placed.append([])
        for grid in wanted:
            placed[-1].append((columns[0], grid))
            columns = columns[int(np.prod(grid)) :]
        assert not columns, f"{case.name}: {len(columns)} placeholders more than {wanted}"
    return VisualLayout.from_grids(placed)
