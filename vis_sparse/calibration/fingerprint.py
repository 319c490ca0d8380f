"""Fingerprints: whether a model, its files and its samples are the ones that an earlier run had."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import reduce
from importlib.metadata import version
from pathlib import Path

import torch

_WHOLE = 64 << 20  # bytes of a checkpoint's file up to which it is read


def of_sample(sample: dict, before: str = "") -> str:
    """Hex digest of a sample and of what came before it."""
    digest = hashlib.sha256(before.encode())
    for name in sorted(sample):
        digest.update(name.encode())
        _add(digest, sample[name])
    return digest.hexdigest()


def _add(digest, value) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} values".encode())
        for each in value:
            _add(digest, each)
    else:
        digest.update(repr(value).encode())


def of_samples(samples: Iterable[dict]) -> str:
    """Hex digest of samples in their order."""
    return reduce(lambda before, sample: of_sample(sample, before), samples, "")


def of_checkpoint(name: str) -> str:
    """What tells a checkpoint from others of its name: hex digest of the files in its folder; of a name that
    transformers looks up, the revision that is here.

    Files up to 64 MiB count by what is in them, larger ones (the weights: reading some hundred gigabytes to see that a
    result is there already would be dear) by size and time of the last change. A copy of a large checkpoint may so
    count as another one; one that was written anew never counts as the same. Raises OSError if there is none.
    """
    folder = Path(name)
    if not folder.is_dir():
        from transformers.utils import cached_file

        return Path(cached_file(name, "config.json")).parent.name
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        facts = file.stat()
        digest.update(f"{file.relative_to(folder)} {facts.st_size} ".encode())
        is_small = facts.st_size <= _WHOLE
        digest.update(hashlib.sha256(file.read_bytes()).digest() if is_small else str(facts.st_mtime_ns).encode())
    return digest.hexdigest()


def of_versions(*packages: str) -> dict[str, str]:
    """Versions of this package, torch, transformers and `packages`, by name."""
    return {name: version(name) for name in ("vis_sparse", "torch", "transformers", *packages)}
