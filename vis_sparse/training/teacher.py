"""What the dense model says at the answers' tokens, computed once and kept on disk: its most likely tokens.

The teacher is the model itself, unpatched, with the weights that training starts from: there is no second model in
memory, and no second run of its tower in a step. Kept are the log-probabilities of the `top` tokens at each row that
predicts an answer's token, 6 bytes each; what the others have together is what is left of 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..calibration import processes
from ..calibration.records import SampleError
from ..calibration.samples import NO_LABEL, on_device
from ..patches import unpatched
from ..patches.calibrated import of_weights
from ..plans.tensor_file import read_tensors, write_tensors
from .conversations import Conversation, digest
from .encoding import Encoder

_SHARD = 256  # conversations a file
_BYTES = 6  # of a token: int32 and fp16
NO_TOKEN = -1


class Teacher:
    """The dense model's answers for a list of conversations, in files of `folder`."""

    def __init__(self, folder: Path, top: int):
        self.folder, self.top = folder, top
        self._shard: tuple[int, dict[str, np.ndarray]] | None = None

    def of(self, index: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids (rows, top) int32, log-probabilities (rows, top) float32) of conversation `index`.

        rows: of its answers' tokens that are there after cutting off.
        """
        number = index // _SHARD
        if self._shard is None or self._shard[0] != number:
            self._shard = number, read_tensors(_file(self.folder, number))[0]
        tensors = self._shard[1]
        ends = np.cumsum(tensors["rows"])
        end = int(ends[index % _SHARD])
        start = end - int(tensors["rows"][index % _SHARD])
        if end - start != rows:
            raise SampleError(f"sample {index}: got {rows} answer tokens, expected the {end - start} that were taught")
        return tensors["ids"][start:end], tensors["log_probabilities"][start:end].astype(np.float32)


def taught(
    model: nn.Module,
    encoder: Encoder,
    conversations: Sequence[Conversation],
    folder: Path,
    top: int,
    most_bytes: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Teacher:
    """The teacher of a patched model with its original weights: what is not in `folder` yet is computed.

    Files stand in a folder named by what they were made from: weights, conversations, images, chat template, `top`.
    Processes share the work. Raises SampleError if the files would take more than `most_bytes`.
    """
    own = folder / _key(model, encoder, conversations, top)
    own.mkdir(parents=True, exist_ok=True)
    (own / "made_from.json").write_text(json.dumps({"conversations": len(conversations), "top": top}))
    rank, count = processes.place()
    numbers = range(-(-len(conversations) // _SHARD))
    mode = model.training
    try:
        with unpatched(model), torch.no_grad():
            model.eval()
            for number in numbers[rank::count]:
                file = _file(own, number)
                if not file.is_file():
                    shard = conversations[number * _SHARD : (number + 1) * _SHARD]
                    write_tensors(file, _said(model, encoder, shard, top), {})
                total = file.stat().st_size / min(_SHARD, len(conversations)) * len(conversations)
                if total > most_bytes:
                    raise SampleError(
                        f"distill: got about {total / 2**30:.1f} GiB of the dense model's answers, expected at most "
                        f"{most_bytes / 2**30:.1f} (fewer top tokens, or a higher limit)"
                    )
                on_step(min(len(conversations), (number + 1) * _SHARD), len(conversations))
    finally:
        model.train(mode)
    processes.gathered(None)  # until all have written theirs
    return Teacher(own, top)


def _said(model: nn.Module, encoder: Encoder, conversations: Sequence[Conversation], top: int) -> dict:
    rows, ids, log_probabilities = [], [], []
    for conversation in conversations:
        inputs = on_device(encoder([conversation]), model)
        columns = (inputs.pop("labels")[0, 1:] != NO_LABEL).nonzero()[:, 0]
        logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits[0].float()
        best = logits.log_softmax(-1).topk(min(top, logits.shape[-1]))
        rows.append(len(columns))
        ids.append(best.indices.int().cpu().numpy())
        log_probabilities.append(best.values.half().cpu().numpy())
    return {
        "rows": np.array(rows, np.int64),
        "ids": np.concatenate(ids),
        "log_probabilities": np.concatenate(log_probabilities),
    }


def divergence(logits: torch.Tensor, ids: torch.Tensor, log_probabilities: torch.Tensor) -> torch.Tensor:
    """KL(teacher || logits) of each row, (rows,) nats, over the teacher's top tokens and all others as one.

    logits (rows, vocabulary); ids (rows, top); log_probabilities (rows, top).
    """
    said = logits.float().log_softmax(-1).gather(-1, ids.long())
    probabilities = log_probabilities.exp()
    kl = (probabilities * (log_probabilities - said)).sum(-1)
    if ids.shape[-1] == logits.shape[-1]:
        return kl
    tiny = torch.finfo(torch.float32).eps
    others, said_others = (1 - each.sum(-1) for each in (probabilities, said.exp()))
    others = others.clamp_min(0)
    return kl + torch.xlogy(others, others) - others * said_others.clamp_min(tiny).log()


def _file(folder: Path, number: int) -> Path:
    return folder / f"answers-{number:05d}.safetensors"


def _key(model: nn.Module, encoder: Encoder, conversations: Sequence[Conversation], top: int) -> str:
    facts = (of_weights(model), digest(conversations), encoder.processor.chat_template, encoder.most_tokens, top)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
