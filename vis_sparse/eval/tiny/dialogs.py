"""Talks about one image: single questions, and conversations whose later turns lean on earlier ones.

Images are easy-VQA's, digit grids (`data`) and pages of words (`reading`). "and below it?" has no answer without the
turn before it; other later turns are questions that could have come first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vis_sparse.eval.tiny import data
from vis_sparse.eval.tiny.data import (
    COLUMNS,
    DIGITS,
    EMPTY,
    ROWS,
    Question,
    Scene,
    easy_vqa_scenes,
    framed,
    grid_scene,
)
from vis_sparse.eval.tiny.reading import ORDINALS, READING, WORDS, Page, page

TURNS = 4
BESIDE = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Turn:
    """A question and its answer, and whether it is understood only after the turn before it."""

    text: str
    answer: str
    kind: str
    leans: bool = False


@dataclass(frozen=True)
class Dialog:
    """Turns about one image (RGB, 96x96)."""

    image: Image.Image
    turns: tuple[Turn, ...]


def questions(kind: str, n: int, seed: int = 0, sizes: Sequence[tuple[int, int]] = ()) -> list[Question]:
    """`data.questions` with one more kind, "reading": the first `n` questions of a kind about held-out images."""
    return framed(reading_questions(n, seed), sizes) if kind == READING else data.questions(kind, n, seed, sizes)


def reading_questions(n: int, seed: int = 0) -> list[Question]:
    """Of test pages ("what does the second line say?"), one question a page."""
    rng = np.random.default_rng([seed, 1000])
    asked = []
    for _ in range(n):
        shown = page(rng, "test", WORDS)
        turn = line_says(shown, int(rng.integers(len(shown.lines))), rng.random() < 0.25)
        asked.append(Question(shown.image, turn.text, turn.answer, READING))
    return asked


def conversations(n: int, split: str = "test", seed: int = 0) -> list[Dialog]:
    """`n` conversations of four turns about images of a split: pages, grids and easy-VQA images in turn."""
    rng = np.random.default_rng([seed, 2000])
    shapes = easy_vqa_scenes(split)
    found = []
    for number in range(n):
        if number % 3 == 0:
            shown = page(rng, split, WORDS)
            found.append(Dialog(shown.image, page_talk(rng, shown)))
        elif number % 3 == 1:
            scene = grid_scene(rng, 12, split)
            found.append(Dialog(scene.image, grid_talk(rng, scene, asked_of(scene))))
        else:
            scene = shapes[rng.integers(len(shapes))]
            found.append(Dialog(scene.image, shape_talk(rng, scene)))
    return found


def asked_of(scene: Scene) -> list[Turn]:
    return [Turn(question.text, question.answer, question.kind) for question in scene.questions]


def grid_talk(rng: np.random.Generator, scene: Scene, asked: Sequence[Turn], length: int = TURNS) -> tuple[Turn, ...]:
    """A conversation that begins with some of `asked`; after a place come its neighbours or how often its digit
    appears."""
    asked = [asked[i] for i in rng.permutation(len(asked))]
    turns = []
    while len(turns) < length:
        after = _after_place(rng, scene, turns[-1]) if turns and rng.random() < 0.7 else None
        turns.append(after or asked.pop())
    return tuple(turns)


def _after_place(rng: np.random.Generator, scene: Scene, turn: Turn) -> Turn | None:
    if turn.kind != "place":
        return None
    cell = ROWS.index(turn.text.split()[-2]) * 3 + COLUMNS.index(turn.text.rstrip("?").split()[-1])
    y, x = divmod(cell, 3)
    options = [Turn("how often does it appear?", DIGITS[scene.cells.count(turn.answer)], "count", leans=True)]
    for name, (dy, dx) in BESIDE.items():
        if 0 <= y + dy < 3 and 0 <= x + dx < 3:
            word = scene.cells[(y + dy) * 3 + x + dx]
            options.append(Turn(f"what is {name} it?", "nothing" if word == EMPTY else word, "beside", leans=True))
    return options[rng.integers(len(options))]


def line_says(shown: Page, number: int, from_the_end: bool = False) -> Turn:
    is_last = number == len(shown.lines) - 1 and from_the_end
    return Turn(f"what does the {'last' if is_last else ORDINALS[number]} line say?", shown.lines[number].word, READING)


def page_turn(rng: np.random.Generator, shown: Page) -> Turn:
    """A question that can come first: mostly what a line says, else which line says a word, or how many lines there
    are."""
    chance, number = rng.random(), int(rng.integers(len(shown.lines)))
    if chance < 0.7:
        return line_says(shown, number, rng.random() < 0.3)
    if chance < 0.9:
        return Turn(f"which line says {shown.lines[number].word}?", ORDINALS[number], "which_line")
    return Turn("how many lines are there?", DIGITS[len(shown.lines)], "lines")


def page_talk(rng: np.random.Generator, shown: Page, length: int = TURNS) -> tuple[Turn, ...]:
    """A conversation about a page; after a line come the ones above and below it."""
    turns, line = [], None
    while len(turns) < length:
        options = (
            [] if line is None else [(step, line + step) for step in (-1, 1) if 0 <= line + step < len(shown.lines)]
        )
        if options and rng.random() < 0.6:
            step, line = options[rng.integers(len(options))]
            way = "below" if step > 0 else "above"
            turns.append(Turn(f"and the line {way} it?", shown.lines[line].word, READING, leans=True))
            continue
        turns.append(page_turn(rng, shown))
        line = next((i for i, one in enumerate(shown.lines) if one.word == turns[-1].answer), None)
    return tuple(turns)


def shape_talk(rng: np.random.Generator, scene: Scene, length: int = TURNS) -> tuple[Turn, ...]:
    """A conversation about an easy-VQA image: its own questions, with "and what color is it?" after a shape, and the
    like."""
    asked = asked_of(scene)
    asked = [asked[i % len(asked)] for i in rng.permutation(max(length, len(asked)))]
    follow = {scene.shape: ("and what color is it?", scene.color), scene.color: ("and what shape is it?", scene.shape)}
    turns = []
    while len(turns) < length:
        text, answer = follow.get(turns[-1].answer, (None, None)) if turns and turns[-1].answer else (None, None)
        if answer and rng.random() < 0.6:
            turns.append(Turn(text, answer, "easy_vqa", leans=True))
        else:
            turns.append(asked.pop())
    return tuple(turns)


def description(shown: Scene | Page) -> Turn | None:
    """What there is to see, in a sentence; None where it is not known."""
    text = None
    if isinstance(shown, Page):
        *before, last = [line.word for line in shown.lines]
        text = f"It shows {DIGITS[len(shown.lines)]} lines of text: {', '.join(before)} and {last}."
    elif shown.cells:
        rows = [[("nothing" if word == EMPTY else word) for word in shown.cells[i : i + 3]] for i in (0, 3, 6)]
        told = [f"the {name} row shows {', '.join(row[:2])} and {row[2]}" for name, row in zip(ROWS, rows, strict=True)]
        text = f"{'; '.join(told)}.".capitalize()
    elif shown.shape and shown.color:
        text = f"It shows a {shown.color} {shown.shape}."
    return text and Turn("describe the picture.", text, "description")
