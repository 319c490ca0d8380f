"""The projector's first weights, without the decoder: visual tokens as sums of SmolLM2's own word embeddings.

A token's target is the mean embedding plus, for everything that it shows, that word's embedding less the mean.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vis_sparse.eval.deep.vision import BLANK, CLASSES, NO_LABEL, Seen

# Words of classes where they are not the class's own: what answers and questions say, and no digit's name for two
# things.
WORDS_FOR = {
    "digit": (*CLASSES["digit"][:-1], "nothing"),
    "count": ("none", "single", "double", "triple"),
    "last": (None, "last"),
}
SHOWN = ("digit", "count", "row", "column", "shape", "color", "word", "line", "last", "lines")
TEMPERATURE = 16
RIDGE = 1e-2


class Words:
    """Embeddings less their mean of the words that visual tokens may show, by class."""

    def __init__(self, embeddings: Tensor, tokenizer):
        self.mean = embeddings.float().mean(dim=0)
        self.of = {}
        for name in SHOWN:
            rows = [self._of(word, embeddings, tokenizer) for word in WORDS_FOR.get(name, CLASSES[name])]
            self.of[name] = torch.stack(rows)

    def _of(self, word: str | None, embeddings: Tensor, tokenizer) -> Tensor:
        """With a space before it and without, where that is one token; else the mean of its pieces."""
        if word is None:
            return torch.zeros_like(self.mean)
        forms = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in (word, f" {word}")]
        ids = [ids[0] for ids in forms if len(ids) == 1] or forms[1]
        return embeddings[ids].float().mean(dim=0) - self.mean

    def targets(self, labels: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, 144, width) and, (B, 144) bool, where anything is known."""
        labels = shown(labels)
        total = self.mean.expand(*labels["word"].shape, -1).clone()
        known = torch.zeros(labels["word"].shape, dtype=torch.bool)
        for name in SHOWN:
            here = labels[name] != NO_LABEL
            total += torch.where(here[..., None], self.of[name][labels[name].clamp(min=0)], 0)
            known |= here
        return total, known

    def loss(self, visual: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Mean over the classes of cross-entropies between cosines, and the share of the targets' energy that is
        missed."""
        labels = shown(labels)
        offsets = F.normalize(visual.float() - self.mean, dim=-1)
        losses = []
        for name in SHOWN:
            if name == "last":
                continue
            cosines = TEMPERATURE * offsets @ F.normalize(self.of[name], dim=-1).T
            wanted = labels[name].flatten()
            each = F.cross_entropy(cosines.flatten(0, 1), wanted, ignore_index=NO_LABEL, reduction="none")
            weight = (wanted != NO_LABEL).float()
            if name == "word":
                weight = weight * torch.where(wanted == CLASSES["word"].index(BLANK), 0.05, 1.0)
            losses.append((each * weight).sum() / weight.sum().clamp(min=1))
        targets, known = self.targets(labels)
        missed = (visual.float() - targets).square().sum(dim=-1)[known].mean()
        return torch.stack(losses).mean() + missed / (targets - self.mean).square().sum(dim=-1)[known].mean()


def shown(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """A page's number of lines is shown by its blank tokens only."""
    blank = labels["word"] == CLASSES["word"].index(BLANK)
    return labels | {"lines": torch.where(blank, labels["lines"], NO_LABEL)}


def new_projector(width: int, text_width: int, seed: int = 0) -> nn.ModuleDict:
    """A LLaVA's projector: linear_1, GELU, linear_2."""
    torch.manual_seed(seed)
    return nn.ModuleDict({"linear_1": nn.Linear(width, text_width), "linear_2": nn.Linear(text_width, text_width)})


def projected(projector: nn.ModuleDict, features: Tensor) -> Tensor:
    return projector["linear_2"](F.gelu(projector["linear_1"](features)))


@torch.no_grad()
def fit(projector: nn.ModuleDict, features: Tensor, targets: Tensor) -> None:
    """Random features of (N, width), and the ridge regression from them to (N, text_width)."""
    first, second = projector["linear_1"], projector["linear_2"]
    mean, spread = features.mean(dim=0), features.std(dim=0)
    first.weight.normal_(std=features.shape[1] ** -0.5).div_(spread)
    first.bias.normal_(std=0.3).sub_(first.weight @ mean)
    hidden = F.pad(F.gelu(first(features)), (0, 1), value=1.0)
    square = hidden.T @ hidden / len(hidden)
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square))
    solution = torch.linalg.solve(square, hidden.T @ targets / len(hidden))
    second.weight.copy_(solution[:-1].T)
    second.bias.copy_(solution[-1])


def polish(projector: nn.ModuleDict, words: Words, parts: list[tuple[Tensor, Seen]], steps: int) -> Iterator[float]:
    """Steps down `Words.loss` over (features, what they show); gives the losses."""
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        features, seen = parts[step % len(parts)]
        with torch.autocast("cpu", torch.bfloat16):
            visual = projected(projector, features)
        loss = words.loss(visual, seen.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
