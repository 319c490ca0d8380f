"""Pages of words to read: two to four lines, one word each, in fonts that come with matplotlib.

A line has a word, a font, a size and a place of its own; a page has an ink and a paper. Test pages have combinations
of words, font sizes and places (of a line's left and top edge) that no training page has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zlib import crc32

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vis_sparse.eval.tiny.data import IMAGE_SIZE

READING = "reading"  # the kind of question
ORDINALS = ("first", "second", "third", "fourth")
MIN_LINES, MAX_LINES = 2, len(ORDINALS)
# Each is one token of SmolLM2's vocabulary, with and without a space before it.
WORDS = tuple(
    """
acid adult alien animal apple area artist aunt baby band base bean bell bench bill birth blood boat bolt bone boot box
brain bread bridge brush budget camera campus card case cell chain chapter child choice circle class clock cloud coal
coat coin comb cookie core cost course cover crop cube cycle dash date deck degree demand device digit doctor dollar
dose drive drug duty east egg engine event face family father female figure finger fish flash flight flow fluid food
force form forum friend fruit game gear glass grade grand grass grid group guide half hand hat health heat hill home
horn host house ice image inch index iron jack joint kernel kid label land leader league letter life lime line lion
list loan log loss lung magic male margin mask match meat menu meter middle milk mind minute moment month mother motor
mouse movie music name neck network night noise nose number ocean oil orbit organ owner pace page pair paper park
party path peak phone picture pipe plant player point port powder price profit purple quick rail range reader region
rest ring road rock room rose route runner sand scene science screen season second seed series shape shell ship shop
shot skill sky snow son sound source space speed spring stable stage stamp step stock store story street student sugar
sun sweet symbol table talk target teacher test theory thread time tooth tower track train tree trip tube union user
van verse view virus voice vote wall watch wave week west wheel width wild window wing winter wolf wood worker worm
year zone
""".split()  # noqa: SIM905
)
FONTS = tuple(
    """
DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSerif DejaVuSerif-Bold STIXGeneral STIXGeneralBol cmr10 cmss10
""".split()  # noqa: SIM905
)
SMALL_FACES = ("STIX", "cm")  # their letters are small for their size: two pixels more
SIZES = {"train": (12.0, 13.0, 14.0, 15.0, 16.0), "test": (12.5, 13.5, 14.5, 15.5)}
MARGIN = 2


@dataclass(frozen=True)
class Line:
    """A word, its box on the page in pixels, (left, top, right, bottom), and the right ends of its letters."""

    word: str
    box: tuple[int, int, int, int]
    ends: tuple[float, ...]


@dataclass(frozen=True)
class Page:
    """A picture (RGB, 96x96) and its lines from top to bottom."""

    image: Image.Image
    lines: tuple[Line, ...]


def page(rng: np.random.Generator, split: str, words: Sequence[str]) -> Page:
    """A new page of a split ("train" or "test") with some of `words`, no word twice."""
    number = int(rng.integers(MIN_LINES, MAX_LINES + 1))
    chosen = _combination(rng, number, split, words)
    ink, paper = _colors(rng)
    fonts = [_font(FONTS[rng.integers(len(FONTS))], float(rng.choice(SIZES[split]))) for _ in range(number)]
    boxes = [font.getbbox(word) for font, word in zip(fonts, chosen, strict=True)]
    room = IMAGE_SIZE - sum(box[3] - box[1] for box in boxes) - MARGIN * (number + 1)
    gaps = np.floor(max(0, room) * rng.dirichlet(np.ones(number + 1))).astype(int)  # before the lines, and below them
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), paper)
    pen = ImageDraw.Draw(canvas)
    top, lines = 0, []
    for word, font, box, gap in zip(chosen, fonts, boxes, gaps, strict=False):
        width, height = box[2] - box[0], box[3] - box[1]
        y = _at(top + MARGIN + int(gap), split)
        x = _at(int(rng.integers(0, max(1, IMAGE_SIZE - width - 1))), split)
        lines.append(_written(pen, word, font, box, (x, y), ink))
        top = y + height
    return Page(canvas, tuple(lines))


def full_page(rng: np.random.Generator, words: Sequence[str]) -> Page:
    """A training page as full as it gets, several words to a row; its `lines` are the words. No question is asked about
    it."""
    ink, paper = _colors(rng)
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), paper)
    pen = ImageDraw.Draw(canvas)
    found, y = [], 2 * int(rng.integers(0, 4))
    while True:
        x, height = 2 * int(rng.integers(0, 12)), 0
        while True:
            word = words[rng.integers(len(words))]
            font = _font(FONTS[rng.integers(len(FONTS))], float(rng.choice(SIZES["train"])))
            box = font.getbbox(word)
            if x + box[2] - box[0] >= IMAGE_SIZE or y + box[3] - box[1] >= IMAGE_SIZE:
                break
            found.append(_written(pen, word, font, box, (x, y), ink))
            x = _at(found[-1].box[2] + int(rng.integers(5, 16)), "train")
            height = max(height, box[3] - box[1])
        if not height:
            return Page(canvas, tuple(found))
        y = _at(y + height + int(rng.integers(2, 6)), "train")


def _written(pen, word: str, font, box: tuple[int, ...], at: tuple[int, int], ink) -> Line:
    x, y = at
    pen.text((x - box[0], y - box[1]), word, font=font, fill=ink)
    ends = tuple(x - box[0] + font.getlength(word[: end + 1]) for end in range(len(word)))
    return Line(word, (x, y, x + box[2] - box[0], y + box[3] - box[1]), ends)


def _at(place: int, split: str) -> int:
    """Training lines begin at even pixels, test lines at odd ones."""
    return place - place % 2 + (split == "test")


def _combination(rng: np.random.Generator, number: int, split: str, words: Sequence[str]) -> list[str]:
    while True:
        chosen = [words[i] for i in rng.choice(len(words), size=number, replace=False)]
        if (crc32(" ".join(chosen).encode()) % 10 == 0) == (split == "test"):
            return chosen


def _colors(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper, one dark and one light."""
    dark, light = rng.integers(0, 90, size=3), rng.integers(190, 256, size=3)
    if rng.random() < 0.25:
        dark, light = light, dark
    return tuple(map(int, dark)), tuple(map(int, light))


@cache
def _font(file: str, size: float) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"{file}.ttf", size + (2 if file.startswith(SMALL_FACES) else 0))
