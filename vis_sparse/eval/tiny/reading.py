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
acid actor adult agent alien angel animal answer apple arch area arrow artist atom aunt author baby ball band bank
base bath bean bear bell belt bench berry bill bird birth block blood board boat body bolt bomb bone book boot border
box boys brain branch bread break bridge brown brush bucket budget button camera camp campus canvas card cart case
castle cell center chain chair chapter chart child chip choice church circle city class clay clock cloth cloud club
coal coast coat code coin color comb cook cookie copy core corn cost count course court cover crime crop cross cube
culture cycle dark dash data date deal deck deep degree delay demand design device dial digit dish doctor dog dollar
door dose dream drive drop drug dust duty earth east edge egg energy engine escape event expert face fact family farm
father feet female field figure film finger fire fish flag flash flat flight floor flow flower fluid folder food foot
force forest form fort forum frame friend front fruit fuel game gate gear girl glass gold grade grain grand grant
grass green grid ground group guard guide hair half hall hand harm hat head health heart heat hero hill hole home hook
horn horse host hour house human ice idea image impact inch income index ink iron item jack job joint jump kernel key
kid king label lake land lane leader leaf league leg letter level life light lime limit line link lion liquid list
liver loan lock log loop loss love lung machine magic mail male map margin market mask master match meal meat memory
menu metal meter method middle mile milk mill mind mine minute model moment money month moon mother motion motor mount
mouse mouth movie museum music nail name nation neck nest network news night node noise north nose note number object
ocean office oil orange orbit order organ oven owner oxygen pace pack page pain pair panel paper parent park part
party past path peace peak people phone photo picture piece pipe planet plant plate player plot point pool port post
powder power price print profit proof purple quest quick radio rail rain range rate reader record region report rest
rice ring river road robot rock role room root rose round route rule runner salt sand scale scene school science score
screen sea season seat second secret seed sensor series server shape sheet shell shield ship shirt shop shore shot
size skill skin sky snake snow soil son song sound soup source south space speech speed spirit spring square stable
staff stage stairs stamp star step stick stock stone store storm story stream street string student study sugar summer
sun surface sweet switch symbol system table tail talk tank target task teacher team test text theory thing thread
tile time tool tooth topic tower town track trade train travel tree trial trip trust tube turn union unit user value
van vector verse video view vine virus visit voice volume vote wage wall war watch water wave web week weight west
wheat wheel white width wife wild wind window wine wing winner winter wire wolf woman wood word worker world worm yard
year yellow zone
""".split()  # noqa: SIM905
)
FONTS = tuple(
    """
DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif DejaVuSerif-Bold
DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10 cmss10 cmtt10 cmb10
""".split()  # noqa: SIM905
)
SMALL_FACES = ("STIX", "cm")  # their letters are small for their size: two pixels more
SIZES = {"train": (11.0, 12.0, 13.0, 14.0, 15.0, 16.0), "test": (11.5, 12.5, 13.5, 14.5, 15.5)}
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
