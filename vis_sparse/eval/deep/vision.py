"""First stage: a vision tower that knows what is where, before any decoder.

Heads of their own read each of the 144 tokens: the digit of its cell and how often that digit is in the grid, the word whose box
it lies in, that word's line, how many lines there are, the shape, its colour. The first four layers are those of the shipped
tiny LLaVA, four more start as nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration

from vis_sparse.eval.tiny import checkpoint, model_llava
from vis_sparse.eval.tiny.data import COLORS, COLUMNS, DIGITS, EMPTY, IMAGE_SIZE, ROWS, SHAPES, Scene
from vis_sparse.eval.tiny.reading import MAX_LINES, ORDINALS, WORDS, Page

GRID, PATCH = model_llava.GRID, model_llava.PATCH
NO_LABEL = -100
LAYERS = 8
BLANK = "blank"
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
}


def vision_config() -> CLIPVisionConfig:
    """96x96 images, patches of 8: 144 tokens; 8 layers x 128."""
    return CLIPVisionConfig(
        image_size=IMAGE_SIZE, patch_size=PATCH, hidden_size=128, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=4, projection_dim=128, hidden_act="quick_gelu",
    )  # fmt: skip


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


def features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(B, 144, 128): what a LLaVA takes from its tower."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
    return hidden[:, 1:]


class Heads(nn.Module):
    """A linear head for each of `CLASSES`: (B, 144, 128) to {name: (B, 144, classes)}."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in CLASSES.items()})

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(hidden)
        return {name: head(hidden) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Seen:
    """Images and what their tokens show. pixels: (B, 3, 96, 96); labels: {name: (B, 144) int64}, `NO_LABEL` where not known."""

    pixels: Tensor
    labels: dict[str, Tensor]


def seen(images: Sequence[Scene | Page]) -> Seen:
    every = [labels_of(image) for image in images]
    labels = {name: torch.from_numpy(np.stack([one[name] for one in every])) for name in CLASSES}
    return Seen(model_llava.pixels([image.image for image in images]), labels)


def labels_of(image: Scene | Page) -> dict[str, np.ndarray]:
    """Class indices of an image's tokens, {name: (144,) int64}."""
    labels = {name: np.full(GRID * GRID, NO_LABEL) for name in CLASSES}
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
    if image.shape:
        labels["shape"][:] = SHAPES.index(image.shape)
    if image.color:
        labels["color"][:] = COLORS.index(image.color)
    return labels


def _label_page(labels: dict[str, np.ndarray], page: Page, y: np.ndarray, x: np.ndarray) -> None:
    middle_y, middle_x = y * PATCH + PATCH / 2, x * PATCH + PATCH / 2
    labels["word"][:] = CLASSES["word"].index(BLANK)
    labels["lines"][:] = len(page.lines)
    for number, line in enumerate(page.lines):
        left, top, right, bottom = line.box
        inside = (middle_x > left - 2) & (middle_x < right + 2) & (middle_y > top - 2) & (middle_y < bottom + 2)
        labels["word"][inside] = CLASSES["word"].index(line.word)
        labels["line"][inside] = number
        labels["last"][inside] = number == len(page.lines) - 1


def head_losses(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropies, 0 where nothing is known; a page's blank tokens together count a third of its words."""
    losses = {}
    for name, values in logits.items():
        wanted = labels[name].flatten()
        each = F.cross_entropy(values.float().flatten(0, 1), wanted, ignore_index=NO_LABEL, reduction="none")
        weight = (wanted != NO_LABEL).float()
        if name == "word":
            weight = weight * torch.where(wanted == len(CLASSES["word"]) - 1, 0.05, 1.0)
        losses[name] = (each * weight).sum() / weight.sum().clamp(min=1)
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
