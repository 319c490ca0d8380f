"""A plan travels with its checkpoint: what `save_pretrained` of a patched model writes beside the weights.

A whole checkpoint carries its plans in config.json. An adapter's folder has no config.json, so they stand in a file of
their own there, vis_sparse.json, beside adapter_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ..plans.atomic_write import is_file, replaced
from ..plans.carried import ADAPTER_FILE, KEY
from .errors import PatchError

_NOTHING = object()


def save_pretrained(state, plain, save_directory, *args, **kwargs):
    """The model's own `save_pretrained`, with the block of `state` in config.json, or in an adapter's folder."""
    with _carried(state.model.config, state.block):
        done = plain(save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        for folder in _adapter_folders(Path(save_directory)):
            _write(folder / ADAPTER_FILE, {KEY: state.block})
    return done


def save_block(block: dict, folder: Path) -> None:
    """Write the block into a folder that holds a checkpoint or adapters already."""
    adapters, config = _adapter_folders(folder), folder / "config.json"
    for adapter in adapters:
        _write(adapter / ADAPTER_FILE, {KEY: block})
    if is_file(config):
        _write(config, json.loads(config.read_text(encoding="utf-8")) | {KEY: block})
    elif not adapters:
        raise PatchError(
            f"folder: got {str(folder)!r} without config.json and adapter_config.json, expected a saved checkpoint or "
            "adapter"
        )


@contextmanager
def _carried(config, block: dict) -> Iterator[None]:
    """Within the block, the configuration holds the plans; what it held before, or nothing, afterwards."""
    before = vars(config).get(KEY, _NOTHING)
    setattr(config, KEY, block)
    try:
        yield
    finally:
        if before is _NOTHING:
            delattr(config, KEY)
        else:
            setattr(config, KEY, before)


def carried_block(model: nn.Module):
    """The block of the checkpoint that a model was loaded from; None if it had none."""
    return vars(getattr(model, "config", object)).get(KEY)


def _adapter_folders(folder: Path) -> list[Path]:
    """The folder, or those in it, that hold an adapter: PEFT puts those of other names than `default` in folders."""
    return sorted(file.parent for file in (*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json")))


def _write(file: Path, data: dict) -> None:
    with replaced(file) as new:
        new.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
