"""Fingerprints: whether a model and its samples are the ones that an interrupted run had."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import reduce

import torch
from torch import nn

_VALUES = 64  # of every parameter, spread over it


def of_weights(model: nn.Module) -> str:
    """Hex digest of the names, shapes and some values of the parameters: tells models apart, not every change."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().flatten()
        digest.update(_bytes(flat[:: max(1, flat.numel() // _VALUES)]))
    return digest.hexdigest()


def of_sample(sample: dict, before: str = "") -> str:
    """Hex digest of the tensors of a sample and of what came before it."""
    digest = hashlib.sha256(before.encode())
    for name in sorted(sample):
        if isinstance(sample[name], torch.Tensor):
            digest.update(name.encode())
            digest.update(_bytes(sample[name]))
    return digest.hexdigest()


def of_samples(samples: Iterable[dict]) -> str:
    """Hex digest of samples in their order."""
    return reduce(lambda before, sample: of_sample(sample, before), samples, "")


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
