"""Several questions about one image in one sequence: the image is computed once, the questions do not see each other.

A sequence is the beginning, up to the image's end (`<s> USER: <image> x 144` for the LLaVA), then `QUESTIONS` slots of
`SLOT` tokens, each "question ASSISTANT: answer". A slot sees the beginning and itself only, and positions restart after
the image: every answer gets the numbers that it gets alone, and a LLaVA's sequence with twelve of them has 290 tokens
where one alone has 158.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from vis_sparse.eval.tiny.data import COLORS, COLUMNS, DIGITS, EMPTY, ROWS, SHAPES, Question, Scene
from vis_sparse.eval.tiny.families import family_of, grid_of
from vis_sparse.eval.tiny.words import EOS, PAD, WORD_IDS

QUESTIONS = 12
SLOT = 12
NO_LABEL = -100
TEMPERATURE = 16


ATTENTION = "vis_sparse_blocks"


@dataclass(frozen=True)
class Batch:
    """Images of one size, questions and what the images show; `NO_LABEL` marks what is not known or not asked.

    `pixels` (B, ...) fp32, prepared as the processor does; `grid` (height, width) of an image in visual tokens;
    `tokens` and `targets` (B, QUESTIONS * SLOT) int64; `cells` (B, 9), `shapes` (B,) and `colors` (B,) int64 class
    indices; `taught` (B, visual tokens, width of a token): the visual tokens of a teacher.
    """

    pixels: Tensor
    grid: tuple[int, int]
    tokens: Tensor
    targets: Tensor
    cells: Tensor
    shapes: Tensor
    colors: Tensor
    taught: Tensor | None = None


def batch(scenes: Sequence[Scene], family: ModuleType) -> Batch:
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
        family.pixels([scene.image for scene in scenes]),
        grid_of(scenes[0].image, family),
        tokens.flatten(1),
        targets.flatten(1),
        cells,
        torch.tensor([SHAPES.index(scene.shape) if scene.shape else NO_LABEL for scene in scenes]),
        torch.tensor([COLORS.index(scene.color) if scene.color else NO_LABEL for scene in scenes]),
    )


def _token_ids(question: Question) -> list[int]:
    words = [*question.text.replace("?", " ?").split(), "assistant:", question.answer]
    return [WORD_IDS[word] for word in words]


def block_mask(family: ModuleType, grid: tuple[int, int], blind: bool = False) -> Tensor:
    """(1, 1, L, L) bool, True where a row (query) sees a column (key). `blind`: slots do not see the visual tokens."""
    before, visual = len(family.BEFORE), len(family.places(grid))
    start = before + visual + len(family.AFTER)
    length = start + QUESTIONS * SLOT
    block = torch.arange(length).sub(start).div(SLOT, rounding_mode="floor").clamp(min=-1)
    visible = (block[:, None] == block) | (block == -1)
    visible &= torch.ones(length, length, dtype=torch.bool).tril()
    if blind:
        visible[start:, before : before + visual] = False
    return visible[None, None]


def block_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """What `block_mask` lets through, computing nothing else: (B, heads, L, head_dim) to (B, L, heads, head_dim)."""
    batch, heads, length, width = query.shape
    if key.shape[1] < heads:
        key, value = (rows.repeat_interleave(heads // rows.shape[1], dim=1) for rows in (key, value))
    start = length - QUESTIONS * SLOT
    beginning = torch.ones(start, start, dtype=torch.bool).tril()
    scores = query[:, :, :start] @ key[:, :, :start].transpose(-1, -2)
    before = _softmax(scores.masked_fill(~beginning, -1e9), scaling, value.dtype) @ value[:, :, :start]

    def by_slot(rows: Tensor) -> Tensor:
        return rows[:, :, start:].reshape(batch * heads * QUESTIONS, SLOT, width)

    slot = torch.ones(SLOT, SLOT, dtype=torch.bool).tril()
    own = (by_slot(query) @ by_slot(key).transpose(-1, -2)).masked_fill(~slot, -1e9)
    scores = query[:, :, start:] @ key[:, :, :start].transpose(-1, -2)
    scores = torch.cat([scores, own.view(batch, heads, QUESTIONS * SLOT, SLOT)], dim=-1)
    weights = _softmax(scores, scaling, value.dtype)
    after = weights[..., :start] @ value[:, :, :start]
    own = weights[..., start:].reshape(-1, SLOT, SLOT) @ by_slot(value)
    after = after + own.view(batch, heads, QUESTIONS * SLOT, width)
    return torch.cat([before, after], dim=2).transpose(1, 2), None


def _softmax(scores: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return (scores.float() * scaling).softmax(dim=-1).to(dtype)


def block_positions(family: ModuleType, grid: tuple[int, int]) -> Tensor:
    """Position ids, (1, L) or (3, 1, L) int64: the family's up to the first slot, and every slot goes on from there."""
    beginning = family.positions(grid)
    slots = beginning.max() + 1 + torch.arange(SLOT).repeat(QUESTIONS)
    return torch.cat([beginning, slots.expand(*beginning.shape[:-1], -1)], dim=-1)


def answer_logits(model, visual: Tensor, tokens: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Next-word logits of all slots, (B, QUESTIONS * SLOT, words)."""
    text, family = model.model.language_model, family_of(model)

    def always(ids: Sequence[int]) -> Tensor:
        return text.embed_tokens(torch.tensor([ids], dtype=torch.long)).expand(len(tokens), -1, -1)

    before = always(family.BEFORE)
    embeddings = [before, visual.to(before.dtype), always(family.AFTER), text.embed_tokens(tokens)]
    hidden = text(
        inputs_embeds=torch.cat(embeddings, dim=1), attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, -tokens.shape[1] :])


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

    rows, columns = (family_of(model).places(data.grid) * 3).long().T  # the third that a token has its middle in
    in_cell = F.one_hot(rows * 3 + columns, 9).T.to(cosines.dtype)
    cells = in_cell @ cosines / in_cell.sum(dim=1, keepdim=True)
    rows, columns = (axis.expand(len(visual), -1) for axis in (rows, columns))
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
    family = family_of(model)
    right, asked, by_size = defaultdict(int), defaultdict(int), defaultdict(list)
    for scene in scenes:
        by_size[scene.image.size].append(scene)
    for alike in by_size.values():
        for start in range(0, len(alike), batch_size):
            chosen = alike[start : start + batch_size]
            data = batch(chosen, family)
            visual = family.visual_tokens(model, data.pixels, data.grid)
            positions = block_positions(family, data.grid)
            logits = answer_logits(model, visual, data.tokens, block_mask(family, data.grid, blind), positions)
            correct = (logits.argmax(dim=-1) == data.targets) | (data.targets == NO_LABEL)
            correct = correct.view(len(correct), QUESTIONS, SLOT).all(dim=-1)
            for scene, row in zip(chosen, correct.tolist(), strict=True):
                for question, ok in zip(scene.questions, row, strict=False):
                    asked[question.kind] += 1
                    right[question.kind] += ok
    return {kind: right[kind] / asked[kind] for kind in asked}


AttentionInterface.register(ATTENTION, block_attention)
