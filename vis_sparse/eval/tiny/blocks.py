"""Several questions about one image in one sequence: the image is computed once, the questions do not see each other.

A sequence is `<s> USER: <image> x 144`, then `QUESTIONS` slots of `SLOT` tokens, each "question ASSISTANT: answer". A
slot sees the beginning and itself only, and positions restart after the image: every answer gets the numbers that it
gets alone, and a sequence with twelve of them has 290 tokens where one alone has 158.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vis_sparse.eval.tiny.data import COLORS, COLUMNS, DIGITS, EMPTY, ROWS, SHAPES, Question, Scene
from vis_sparse.eval.tiny.model import BOS, EOS, GRID, PAD, WORDS

QUESTIONS = 12
SLOT = 12
VISUAL = GRID * GRID
START = 2 + VISUAL
NO_LABEL = -100
WORD_IDS = {word: i for i, word in enumerate(WORDS)}
TEMPERATURE = 16


ATTENTION = "vis_sparse_blocks"


@dataclass(frozen=True)
class Batch:
    """Images, questions and what the images show; `NO_LABEL` marks what is not known or not asked.

    `pixels` (B, 3, 96, 96) fp32, prepared as the processor does; `tokens` and `targets` (B, QUESTIONS * SLOT) int64;
    `cells` (B, 9), `shapes` (B,) and `colors` (B,) int64 class indices.
    """

    pixels: Tensor
    tokens: Tensor
    targets: Tensor
    cells: Tensor
    shapes: Tensor
    colors: Tensor


def batch(scenes: Sequence[Scene]) -> Batch:
    images = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    tokens = torch.full((len(scenes), QUESTIONS, SLOT), PAD)
    targets = torch.full_like(tokens, NO_LABEL)
    cells = torch.full((len(scenes), 9), NO_LABEL)
    for i, scene in enumerate(scenes):
        for j, question in enumerate(scene.questions):
            row = _token_ids(question)
            tokens[i, j, : len(row)] = torch.tensor(row)
            targets[i, j, len(row) - 2 : len(row)] = torch.tensor([row[-1], EOS])
        if scene.cells:
            cells[i] = torch.tensor([(*DIGITS, EMPTY).index(word) for word in scene.cells])
    return Batch(
        (images / 255 - mean) / std,
        tokens.flatten(1),
        targets.flatten(1),
        cells,
        torch.tensor([SHAPES.index(scene.shape) if scene.shape else NO_LABEL for scene in scenes]),
        torch.tensor([COLORS.index(scene.color) if scene.color else NO_LABEL for scene in scenes]),
    )


def _token_ids(question: Question) -> list[int]:
    words = [*question.text.replace("?", " ?").split(), "assistant:", question.answer]
    return [WORD_IDS[word] for word in words]


def block_mask(blind: bool = False) -> Tensor:
    """(1, 1, L, L) bool, True where a row (query) sees a column (key). `blind`: slots do not see the visual tokens."""
    length = START + QUESTIONS * SLOT
    block = torch.arange(length).sub(START).div(SLOT, rounding_mode="floor").clamp(min=-1)
    visible = (block[:, None] == block) | (block == -1)
    visible &= torch.ones(length, length, dtype=torch.bool).tril()
    if blind:
        visible[START:, 2:START] = False
    return visible[None, None]


def block_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """What `block_mask()` lets through, computing nothing else: (B, heads, L, head_dim) to (B, L, heads, head_dim)."""
    batch, heads, _, width = query.shape
    beginning = torch.ones(START, START, dtype=torch.bool).tril()
    scores = query[:, :, :START] @ key[:, :, :START].transpose(-1, -2)
    before = _softmax(scores.masked_fill(~beginning, -1e9), scaling, value.dtype) @ value[:, :, :START]

    def by_slot(rows: Tensor) -> Tensor:
        return rows[:, :, START:].reshape(batch * heads * QUESTIONS, SLOT, width)

    slot = torch.ones(SLOT, SLOT, dtype=torch.bool).tril()
    own = (by_slot(query) @ by_slot(key).transpose(-1, -2)).masked_fill(~slot, -1e9)
    scores = query[:, :, START:] @ key[:, :, :START].transpose(-1, -2)
    scores = torch.cat([scores, own.view(batch, heads, QUESTIONS * SLOT, SLOT)], dim=-1)
    weights = _softmax(scores, scaling, value.dtype)
    after = weights[..., :START] @ value[:, :, :START]
    own = weights[..., START:].reshape(-1, SLOT, SLOT) @ by_slot(value)
    after = after + own.view(batch, heads, QUESTIONS * SLOT, width)
    return torch.cat([before, after], dim=2).transpose(1, 2), None


def _softmax(scores: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return (scores.float() * scaling).softmax(dim=-1).to(dtype)


def block_positions() -> Tensor:
    """(1, L) int64 position ids: one run to the end of the image, and every slot goes on from there."""
    slots = START + torch.arange(SLOT).repeat(QUESTIONS)
    return torch.cat([torch.arange(START), slots])[None]


def visual_tokens(model, pixels: Tensor) -> Tensor:
    """Projected patch embeddings, (B, 144, 128)."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
    return model.model.multi_modal_projector(hidden[:, 1:])


def answer_logits(model, visual: Tensor, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Next-word logits of all slots, (B, QUESTIONS * SLOT, words)."""
    text = model.model.language_model
    start = text.embed_tokens(torch.tensor([[BOS, WORD_IDS["user:"]]])).expand(len(tokens), -1, -1)
    embeddings = torch.cat([start, visual.to(start.dtype), text.embed_tokens(tokens)], dim=1)
    hidden = text(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, START:])


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NO_LABEL)


def word_losses(model, visual: Tensor, data: Batch) -> Tensor:
    """Losses that make visual tokens bags of the language model's own words, (5,): digit, row, column, shape, colour.

    A token is compared (cosine) with word embeddings: a cell's mean with the digit words and "empty", every token with
    the words of its row and column, the image's mean with the shape and colour words.
    """
    embeddings = F.normalize(model.model.language_model.embed_tokens.weight.float(), dim=-1)
    cosines = TEMPERATURE * F.normalize(visual.float(), dim=-1) @ embeddings.T

    def loss(values: Tensor, words: Sequence[str], labels: Tensor) -> Tensor:
        values = values[..., [WORD_IDS[word] for word in words]].flatten(0, -2)
        # A sum over the known labels: a batch without any must give 0, not 0/0.
        total = F.cross_entropy(values, labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
        return total / (labels != NO_LABEL).sum().clamp(min=1)

    side = GRID // 3
    cells = cosines.view(-1, 3, side, 3, side, len(WORDS)).mean(dim=(2, 4)).flatten(1, 2)
    thirds = torch.arange(VISUAL)
    rows = (thirds // GRID // side).expand(len(visual), -1)
    columns = (thirds % GRID // side).expand(len(visual), -1)
    image = cosines.mean(dim=1)
    return torch.stack([
        loss(cells, (*DIGITS, EMPTY), data.cells),
        loss(cosines, ROWS, rows),
        loss(cosines, COLUMNS, columns),
        loss(image, SHAPES, data.shapes),
        loss(image, COLORS, data.colors),
    ])


@torch.no_grad()
def accuracy(model, scenes: Sequence[Scene], blind: bool = False, batch_size: int = 16) -> dict[str, float]:
    """Share of the scenes' questions whose answer, and the end after it, is the likeliest next word; by kind.

    `blind`: no question sees a visual token; this needs an attention that obeys a 4-D mask (SDPA, not `ATTENTION`).
    """
    mask, positions = block_mask(blind), block_positions()
    right, asked = defaultdict(int), defaultdict(int)
    for start in range(0, len(scenes), batch_size):
        data = batch(scenes[start : start + batch_size])
        logits = answer_logits(model, visual_tokens(model, data.pixels), data.tokens, mask, positions)
        correct = (logits.argmax(dim=-1) == data.targets) | (data.targets == NO_LABEL)
        correct = correct.view(len(correct), QUESTIONS, SLOT).all(dim=-1)
        for scene, row in zip(scenes[start : start + batch_size], correct.tolist(), strict=True):
            for question, ok in zip(scene.questions, row, strict=False):
                asked[question.kind] += 1
                right[question.kind] += ok
    return {kind: right[kind] / asked[kind] for kind in asked}


AttentionInterface.register(ATTENTION, block_attention)
