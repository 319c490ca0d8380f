"""A small data set in LLaVA's format to try `finetune` on: `python -m vis_sparse.eval.conversations --out FOLDER`.

Conversations of several turns about the tiny models' images: `train.json`, `held_out.json` (other images and digits)
and their pictures in `images`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from .tiny.data import Question, easy_vqa_scenes, framed, grid_scene
from .tiny.families import FAMILIES

TURNS = 3


def write_conversations(
    folder: Path, train: int = 256, held_out: int = 64, family: str = "llava", seed: int = 0
) -> dict[str, Path]:
    """Write both files and the images; returns the files by name. family: whose sizes of images are drawn."""
    sizes, files = FAMILIES[family].SIZES, {}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, split, count in (("train", "train", train), ("held_out", "test", held_out)):
        rng, rows = np.random.default_rng([seed, len(files)]), []
        for number in range(count):
            scene = framed([_scene(rng, split, number)], sizes[number % len(sizes) :][:1] if sizes else ())[0]
            image = f"images/{name}-{number:05d}.png"
            scene.image.save(folder / image)
            rows.append({"id": f"{name}-{number}", "image": image, "conversations": _turns(scene.questions)})
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return files


def _scene(rng: np.random.Generator, split: str, number: int):
    if number % 4 == 3:
        scenes = easy_vqa_scenes(split)
        scene = scenes[rng.integers(len(scenes))]
        asked = [scene.questions[i] for i in rng.permutation(len(scene.questions))[:TURNS]]
        return type(scene)(scene.image, tuple(asked))
    return grid_scene(rng, TURNS, split)


def _turns(questions: tuple[Question, ...]) -> list[dict]:
    turns = []
    for number, question in enumerate(questions):
        text = question.text if number else f"<image>\n{question.text}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--train", type=int, default=256, help="conversations to train on")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--family", choices=FAMILIES, default="llava")
    given = parser.parse_args()
    files = write_conversations(given.out, given.train, given.held_out, given.family)
    print("\n".join(map(str, files.values())))


if __name__ == "__main__":
    main()
