"""First stage: a vision tower that knows what is where, before any decoder.

Heads of their own read each of the 144 tokens: the digit of its cell and how often that digit is in the grid, the word
whose box it lies in, that word's line, how many lines there are, the shape, its colour. The first four layers are those
of the shipped tiny LLaVA, four more start as nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from vis_sparse.eval.tiny import checkpoint, model_llava
from vis_sparse.eval.tiny.data import COLORS, COLUMNS, DIGITS, EMPTY, ROWS, SHAPES, Scene
from vis_sparse.eval.tiny.model_smol import vision_config
from vis_sparse.eval.tiny.reading import MAX_LINES, ORDINALS, WORDS, Line, Page

GRID, PATCH = model_llava.GRID, model_llava.PATCH
NO_LABEL = -100
LAYERS = vision_config().num_hidden_layers
BLANK = "blank"
LETTERS = 7  # of the longest word
# In the loss: what takes long to learn counts, what is noisy and nearly known does not.
WEIGHTS = {"letter": 2.0, "word": 1.0, "count": 1.0, "row": 0.1, "column": 0.1, "shape": 0.1, "color": 0.1} | {
    name: 0.3 for name in ("digit", "line", "last", "lines", *(f"many_{digit}" for digit in DIGITS))
}
# What heads tell apart, a word for each class.
CLASSES = {
    "digit": (*DIGITS, EMPTY),
    "count": DIGITS[: 3 + 1],
    "row": ROWS,
    "column": COLUMNS,
    "shape": SHAPES,
    "color": COLORS,
    "word": (*WORDS, BLANK),
    "line": (*ORDINALS,),
    "last": ("not", "last"),
    "lines": DIGITS[: MAX_LINES + 1],
} | {f"letter_{place}": (*ascii_lowercase, BLANK) for place in range(LETTERS)}  # of the word
CLASSES |= {f"many_{digit}": DIGITS[: 3 + 1] for digit in DIGITS}  # in the grid: what a cell's count is chosen from
EARLY_CLASSES = {"letter": tuple(ascii_lowercase)}  # the one under a token, for the middle of the tower


@torch.no_grad()
def new_tower(seed: int = 0) -> CLIPVisionModel:
    """The tiny LLaVA's tower with layers on top that do nothing yet."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(vision_config())
    small = LlavaForConditionalGeneration.from_pretrained(checkpoint("llava"), dtype=torch.float32).model.vision_tower
    found = tower.load_state_dict(small.state_dict(), strict=False)
    assert not found.unexpected_keys
    new = tower.encoder.layers[len(small.encoder.layers) :]
    for layer in new:
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    tower.set_attn_implementation("eager")  # faster than SDPA here, once compiled
    return tower


def features(tower: CLIPVisionModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Twice (B, 144, 128): what a LLaVA takes from its tower, and what the tower has half way."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    half = hidden
    for number, layer in enumerate(tower.encoder.layers):
        hidden = layer(hidden, None)
        half = hidden if number == LAYERS // 2 - 1 else half
    return hidden[:, 1:], half[:, 1:]


class Heads(nn.Module):
    """A linear head for each of `CLASSES` and `EARLY_CLASSES`: what `features` gives to {name: (B, 144, classes)}."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.norm, self.early_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        every = CLASSES | EARLY_CLASSES
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in every.items()})

    def forward(self, hidden: Tensor, half: Tensor) -> dict[str, Tensor]:
        hidden, half = self.norm(hidden), self.early_norm(half)
        return {name: head(half if name in EARLY_CLASSES else hidden) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Seen:
    """Images and what their tokens show. pixels: (B, 3, 96, 96); labels: {name: (B, 144) int64}, `NO_LABEL` where not
    known."""

    pixels: Tensor
    labels: dict[str, Tensor]


def seen(images: Sequence[Scene | Page]) -> Seen:
    every = [labels_of(image) for image in images]
    labels = {name: torch.from_numpy(np.stack([one[name] for one in every])) for name in every[0]}
    return Seen(model_llava.pixels([image.image for image in images]), labels)


def labels_of(image: Scene | Page) -> dict[str, np.ndarray]:
    """Class indices of an image's tokens, {name: (144,) int64}."""
    labels = {name: np.full(GRID * GRID, NO_LABEL) for name in CLASSES | EARLY_CLASSES}
    y, x = np.divmod(np.arange(GRID * GRID), GRID)
    if isinstance(image, Page):
        _label_page(labels, image, y, x)
        return labels
    if image.cells:
        cell = y // 4 * 3 + x // 4
        times = [image.cells.count(word) if word != EMPTY else NO_LABEL for word in image.cells]
        labels["digit"] = np.array([CLASSES["digit"].index(word) for word in image.cells])[cell]
        labels["count"] = np.array(times)[cell]
        labels["row"], labels["column"] = y // 4, x // 4
        for digit in DIGITS:
            labels[f"many_{digit}"][:] = image.cells.count(digit)
    if image.shape:
        labels["shape"][:] = SHAPES.index(image.shape)
    if image.color:
        labels["color"][:] = COLORS.index(image.color)
    return labels


def _label_page(labels: dict[str, np.ndarray], page: Page, y: np.ndarray, x: np.ndarray) -> None:
    middle_y, middle_x = y * PATCH + PATCH / 2, x * PATCH + PATCH / 2
    labels["word"][:] = CLASSES["word"].index(BLANK)
    is_asked = len(page.lines) <= MAX_LINES
    if is_asked:
        labels["lines"][:] = len(page.lines)
    for number, line in enumerate(page.lines):
        left, top, right, bottom = line.box
        inside = (middle_x > left - 2) & (middle_x < right + 2) & (middle_y > top - 2) & (middle_y < bottom + 2)
        labels["word"][inside] = CLASSES["word"].index(line.word)
        labels["letter"][inside] = [ord(line.word[i]) - ord("a") for i in _letter_at(line, middle_x[inside])]
        for place in range(LETTERS):
            letter = line.word[place] if place < len(line.word) else BLANK
            labels[f"letter_{place}"][inside] = CLASSES["letter_0"].index(letter)
        if is_asked:
            labels["line"][inside] = number
            labels["last"][inside] = number == len(page.lines) - 1


def _letter_at(line: Line, x: np.ndarray) -> np.ndarray:
    return np.minimum(np.searchsorted(line.ends, x), len(line.word) - 1)


def head_losses(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropies times `WEIGHTS`, 0 where nothing is known; a page's blank tokens together count a third of its
    words."""
    losses = {}
    for name, values in logits.items():
        wanted = labels[name].flatten()
        each = F.cross_entropy(values.float().flatten(0, 1), wanted, ignore_index=NO_LABEL, reduction="none")
        weight = (wanted != NO_LABEL).float()
        if name == "word":
            weight = weight * torch.where(wanted == len(CLASSES["word"]) - 1, 0.05, 1.0)
        losses[name] = WEIGHTS.get(name, 1.0) * (each * weight).sum() / weight.sum().clamp(min=1)
    return losses


@torch.no_grad()
def head_accuracy(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    """Share of the labelled tokens (of words and lines: those in a word's box) that a head gets right."""
    found = {}
    for name, values in logits.items():
        known = labels[name] != NO_LABEL
        if name == "word":
            known &= labels[name] != len(CLASSES["word"]) - 1
        found[name] = (values.argmax(dim=-1) == labels[name])[known].float().mean().item()
    return found
