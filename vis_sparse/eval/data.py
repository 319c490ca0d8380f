"""Data of the commands `calibrate` and `search` by name: files, folders, and what is generated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..calibration.records import Record, SampleError, read_records

TINY = {
    "tiny-train": "llava",
    "tiny-train-qwen2_vl": "qwen2_vl",
    "tiny-train-internvl": "internvl",
    "tiny-train-smol": "smol",
}
TASKS = "lmms:"


def records(data: str, count: int, prompt: str | None) -> list[Record]:
    """The first `count` records of `data`: a .jsonl or .parquet file, an image folder with one prompt, "lmms:" and a
    task or group of lmms-eval, or a name in `TINY`: the training images of a shipped tiny model, all kinds of questions
    in turn."""
    found = list(islice(_all_records(data, prompt), count))
    if len(found) < count:
        raise SampleError(f"samples: got {count}, expected at most the {len(found)} of {data}")
    return found


def _all_records(data: str, prompt: str | None) -> Iterator[Record]:
    if data in TINY:
        return _tiny(TINY[data])
    if data.startswith(TASKS):
        from .task_records import task_records

        return task_records(data.removeprefix(TASKS))
    if not Path(data).exists():
        raise SampleError(
            f"data: got {data!r}, expected a .jsonl or .parquet file, an image folder, {TASKS}TASK, or "
            f"{' or '.join(TINY)}"
        )
    return read_records(data, prompt)


def _tiny(family: str) -> Iterator[Record]:
    import numpy as np

    from .tiny.data import easy_vqa_scenes, framed, grid_scene
    from .tiny.dialogs import line_says
    from .tiny.families import FAMILIES, kinds_of
    from .tiny.reading import READING, WORDS, page

    sizes = FAMILIES[family].SIZES
    reads = READING in kinds_of(FAMILIES[family])
    rng = np.random.default_rng(0)
    shapes = easy_vqa_scenes("train")
    while True:
        sizes = sizes[1:] + sizes[:1]  # so that every kind of question comes in every size
        scene = shapes[rng.integers(len(shapes))]
        asked = [scene.questions[rng.integers(len(scene.questions))]]
        # one question of a grid, so that samples share no image: place, count, exists
        asked += [grid_scene(rng, 3).questions[kind] for kind in range(3)]
        for question in framed(asked, sizes):
            yield Record(question.image, question.text, question.answer)
        if reads:
            shown = page(rng, "train", WORDS)
            turn = line_says(shown, int(rng.integers(len(shown.lines))))
            yield Record(shown.image, turn.text, turn.answer)
