"""The deep model as it is trained."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vis_sparse.eval.deep.decoder import Decoder
from vis_sparse.eval.deep.projector import Words, new_projector, projected
from vis_sparse.eval.deep.sequences import NO_LABEL, Sequences, visual_places
from vis_sparse.eval.deep.vision import Heads, Seen, features, head_losses, new_tower
from vis_sparse.eval.tiny import smollm2

PARTS = ("lora", "projector", "tower", "heads")


class Model(nn.Module):
    """Tower, its heads, projector and decoder, for training. decoder_of(SmolLM2's tensors): a training decoder."""

    def __init__(self, decoder_of: Callable[[dict[str, Tensor]], Decoder]):
        super().__init__()
        self.tokenizer, state = smollm2.tokenizer(), smollm2.weights()
        self.decoder = decoder_of(state)
        self.tower, self.heads = new_tower(), Heads()
        self.projector = new_projector(128, smollm2.config().hidden_size)
        self.words = Words(state["model.embed_tokens.weight"], self.tokenizer)

    def load(self, weights: Mapping[str, Tensor], parts: Sequence[str] = PARTS) -> None:
        """Weights by their names in a run; what is not among them stays."""
        with torch.no_grad():
            for _, group in self.groups(defaultdict(float)):
                for name, parameter in group.items():
                    if name.split(".")[0] in parts and name in weights:
                        parameter.copy_(weights[name])

    def groups(self, rates: dict[str, float]) -> list[tuple[float, dict]]:
        vision = {f"tower.{name}": p for name, p in self.tower.named_parameters() if "post_layernorm" not in name}
        vision |= {f"heads.{name}": p for name, p in self.heads.named_parameters()}
        return [
            (rates["lora"], {f"lora.{name}": p for name, p in self.decoder.lora.items()}),
            (rates["projector"], {f"projector.{name}": p for name, p in self.projector.named_parameters()}),
            (rates["tower"], vision),
        ]

    def answers(self, data: Sequences, visual: Tensor | None, forward: Callable | None = None) -> Tensor:
        """Next-token logits where `data` has a target, (targets, vocabulary).

        visual: of the first images, (B, 144, width); None where no sequence has an image. forward: of the decoder, if
        another than its own.
        """
        embedded = self.decoder.embeddings[data.ids].float()
        if visual is not None:
            embedded = embedded.masked_scatter(visual_places(data.ids)[..., None], visual.float())
        hidden = (forward or type(self.decoder).forward)(self.decoder, embedded, data.positions, data.visible())
        return self.decoder.logits(hidden[data.targets != NO_LABEL])


def tower_losses(model: Model, images: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Visual tokens; how far they are from sums of word embeddings; the sum of the heads' losses."""
    with torch.autocast("cpu", torch.bfloat16):
        found, half = features(model.tower, images.pixels)
        heads = sum(head_losses(model.heads(found, half), images.labels).values())
        visual = projected(model.projector, found)
    return visual, model.words.loss(visual, images.labels), heads


def answer_loss(model: Model, data: Sequences, visual: Tensor | None, forward: Callable | None = None) -> Tensor:
    """Weighted mean of the targets' cross-entropies; visual, forward: as in `Model.answers`."""
    where = data.targets != NO_LABEL
    each = F.cross_entropy(model.answers(data, visual, forward).float(), data.targets[where], reduction="none")
    weights = data.weights[where]
    return (each * weights).sum() / weights.sum()
