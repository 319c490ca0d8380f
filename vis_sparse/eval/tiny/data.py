"""Two tasks whose images come with PyPI packages: easy-VQA, and 3x3 grids of scanned digits drawn on the fly.

easy-VQA (package `easy_vqa`): one shape in one colour, with that data set's own questions and its own train/test split.
Digit grids (scikit-learn's `load_digits`, 8x8 scans): "which digit is at the top left?" (`place`), "how often does the
digit three appear?" (`count`), "is there a seven?" (`exists`). A digit that a test grid shows is in no training grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import easy_vqa
import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
EMPTY = "empty"
KINDS = ("easy_vqa", "place", "count", "exists")

IMAGE_SIZE = 96
CELL = IMAGE_SIZE // 3
MAX_COUNT = 3
TRAIN_DIGITS = 1300
FRAME = 4
# The frame's colours beside the top, middle and bottom third, and above and below the left, center and right one.
ROW_COLORS = ((255, 0, 255), (255, 140, 0), (0, 255, 255))
COLUMN_COLORS = ((120, 0, 200), (180, 255, 0), (255, 150, 180))


@dataclass(frozen=True)
class Question:
    """One question about one image: `image` is RGB, 96x96 unless resized; `text` and `answer` are lower-case words."""

    image: Image.Image
    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """A training image (RGB, 96x96 unless resized), its questions, and what it shows.

    `cells` holds nine digit words or `EMPTY` in raster order, and is empty for easy-VQA; `shape` and `color` are None
    for a grid, and where the questions of an easy-VQA image do not give them away.
    """

    image: Image.Image
    questions: tuple[Question, ...]
    cells: tuple[str, ...] = ()
    shape: str | None = None
    color: str | None = None


def questions(kind: str, n: int, seed: int = 0, sizes: Sequence[tuple[int, int]] = ()) -> list[Question]:
    """The first `n` held-out questions of a kind (one of `KINDS`), from test images and test digits only.

    sizes: image sizes (height, width), taken in turns with a frame around each image; empty: 96x96 without one. The
    sequence is fixed by `seed`: a larger `n` only adds questions. Every grid question has a grid of its own; counts
    are uniform over 0..3, `exists` is yes or no with even odds. easy-VQA has 9,673 questions about 1,000 images.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    if kind == "easy_vqa":
        asked = [question for scene in easy_vqa_scenes("test") for question in scene.questions]
        if n > len(asked):
            raise ValueError(f"n: got {n}, but easy-VQA has {len(asked)} test questions")
        asked = [asked[i] for i in rng.permutation(len(asked))[:n]]
    else:
        asked = [_held_out_grid_question(kind, rng) for _ in range(n)]
    return framed(asked, sizes)


def framed(shown: Sequence, sizes: Sequence[tuple[int, int]]) -> list:
    """Questions or scenes with their images at `sizes` (height, width) in turns, each in a frame with a ruler's marks.

    The frame is `FRAME` pixels wide and has another colour beside each third of the image: a vision tower without
    absolute positions (Qwen2-VL's), or of one tile (InternVL's), reads off it where a patch is. No sizes: as they are.
    """
    if not sizes:
        return list(shown)
    return [replace(one, image=_framed(one.image, *sizes[i % len(sizes)])) for i, one in enumerate(shown)]


def _framed(image: Image.Image, height: int, width: int) -> Image.Image:
    canvas = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(canvas)
    for third in range(3):
        top, left = third * height // 3, third * width // 3
        pen.rectangle((0, top, width, height), fill=ROW_COLORS[third])
        for edge in (0, height - FRAME):
            pen.rectangle((left, edge, width, edge + FRAME - 1), fill=COLUMN_COLORS[third])
    inner = image.resize((width - 2 * FRAME, height - 2 * FRAME), Image.Resampling.BICUBIC)
    canvas.paste(inner, (FRAME, FRAME))
    return canvas


def _held_out_grid_question(kind: str, rng: np.random.Generator) -> Question:
    digit, times = str(rng.choice(DIGITS)), int(rng.integers(1, MAX_COUNT + 1))
    if kind == "count":
        times = int(rng.integers(0, MAX_COUNT + 1))
    elif kind == "exists" and rng.random() < 0.5:
        times = 0
    cells = _cells(rng, digit, times)
    image = draw_grid(cells, rng, "test")
    if kind == "place":
        filled = [i for i, word in enumerate(cells) if word != EMPTY]
        return _place(image, cells, int(rng.choice(filled)))
    return (_count if kind == "count" else _exists)(image, cells, digit)


def grid_scene(rng: np.random.Generator, num_questions: int, split: str = "train") -> Scene:
    """A new grid of digits of a split with `num_questions` questions, in turn `place`, `count` and `exists`."""
    digit, times = str(rng.choice(DIGITS)), int(rng.integers(0, MAX_COUNT + 1))
    cells = _cells(rng, digit, times)
    image = draw_grid(cells, rng, split)
    filled = [i for i, word in enumerate(cells) if word != EMPTY]
    places = list(rng.permutation(filled))
    by_count = [[word for word in DIGITS if cells.count(word) == count] for count in range(MAX_COUNT + 1)]
    present, absent = [word for word in DIGITS if word in cells], by_count[0]
    asked = []
    for i in range(num_questions):
        kind = KINDS[1 + i % 3]
        if kind == "place" and places:
            asked.append(_place(image, cells, int(places.pop())))
        elif kind == "exists":
            asked.append(_exists(image, cells, str(rng.choice(present if rng.random() < 0.5 else absent))))
        else:
            # Twos and threes are in fewer grids than zeros and ones, so they are asked about more often where they are.
            weights = np.array([1, 1.3, 2, 3]) * [len(words) > 0 for words in by_count]
            asked.append(_count(image, cells, str(rng.choice(by_count[rng.choice(4, p=weights / weights.sum())]))))
    return Scene(image, tuple(asked), cells=cells)


def _cells(rng: np.random.Generator, digit: str, times: int) -> tuple[str, ...]:
    """Nine cells, one to nine of them filled, with `digit` in `times` of them and no digit in more than three."""
    filled = int(rng.integers(max(1, times), 10))
    words = [digit] * times
    for other in rng.permutation([word for word in DIGITS if word != digit]):
        words += [str(other)] * min(int(rng.integers(1, MAX_COUNT + 1)), filled - len(words))
    cells = words + [EMPTY] * (9 - len(words))
    return tuple(cells[i] for i in rng.permutation(9))


def _place(image: Image.Image, cells: tuple[str, ...], cell: int) -> Question:
    return Question(image, f"which digit is at the {ROWS[cell // 3]} {COLUMNS[cell % 3]}?", cells[cell], "place")


def _count(image: Image.Image, cells: tuple[str, ...], digit: str) -> Question:
    return Question(image, f"how often does the digit {digit} appear?", DIGITS[cells.count(digit)], "count")


def _exists(image: Image.Image, cells: tuple[str, ...], digit: str) -> Question:
    article = "an" if digit == "eight" else "a"
    return Question(image, f"is there {article} {digit}?", "yes" if digit in cells else "no", "exists")


def draw_grid(cells: tuple[str, ...], rng: np.random.Generator, split: str) -> Image.Image:
    """Draw nine cells (digit words or `EMPTY`) in black on white; size and place in the cell vary with `rng`.

    Training digits are also turned and stretched a little: 1,300 scans are few.
    """
    scans = digit_scans(split)
    paper = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    for i, word in enumerate(cells):
        if word == EMPTY:
            continue
        ink = scans[word][rng.integers(len(scans[word]))]
        width = height = int(rng.integers(22, 29))
        if split == "train":
            width += int(rng.integers(-3, 4))
            height += int(rng.integers(-3, 4))
            ink = ink.rotate(rng.uniform(-12, 12), resample=Image.Resampling.BICUBIC)
        ink = ink.resize((width, height), Image.Resampling.BICUBIC)
        y, x = i // 3 * CELL, i % 3 * CELL
        paper.paste(ink, (x + int(rng.integers(CELL - width + 1)), y + int(rng.integers(CELL - height + 1))))
    return Image.eval(paper, lambda value: 255 - value).convert("RGB")


@cache
def digit_split() -> dict[str, np.ndarray]:
    """Indices into scikit-learn's 1,797 digits: 1,300 `train`, 497 `test`."""
    order = np.random.default_rng(0).permutation(1797)
    return {"train": order[:TRAIN_DIGITS], "test": order[TRAIN_DIGITS:]}


@cache
def digit_scans(split: str) -> dict[str, list[Image.Image]]:
    """The scans of a split by digit word: 32x32 grey images, ink bright (enlarged from 8x8)."""
    digits = load_digits()
    scans = {word: [] for word in DIGITS}
    for i in digit_split()[split]:
        scan = Image.fromarray((digits.images[i] * (255 / 16)).astype(np.uint8))
        scans[DIGITS[digits.target[i]]].append(scan.resize((CELL, CELL), Image.Resampling.BICUBIC))
    return scans


@cache
def easy_vqa_scenes(split: str) -> list[Scene]:
    """All easy-VQA images of a split (4,000 `train`, 1,000 `test`), each with that data set's questions about it."""
    texts, answers, image_ids = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    asked = {image_id: [] for image_id in paths}
    for text, answer, image_id in zip(texts, answers, image_ids, strict=True):
        asked[image_id].append((text.lower(), answer))
    scenes = []
    for image_id in sorted(paths):
        with Image.open(paths[image_id]) as file:
            image = file.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        pairs = asked[image_id]
        scenes.append(Scene(image, tuple(Question(image, text, answer, "easy_vqa") for text, answer in pairs),
                            shape=_shown(pairs, SHAPES), color=_shown(pairs, COLORS)))
    return scenes


def _shown(pairs: list[tuple[str, str]], words: tuple[str, ...]) -> str | None:
    """The one of `words` that the questions and answers say the image shows."""
    for text, answer in pairs:
        asked = text.rstrip("?").split()
        named = [word for word in words if word in asked]
        denied = "not" in asked or "no" in asked
        if answer in words:
            return answer
        if named and (asked[0] == "what" or answer == ("no" if denied else "yes")):
            return named[0]
    return None
