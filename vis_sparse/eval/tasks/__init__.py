"""lmms-eval tasks for the shipped tiny checkpoints: `lmms-eval --include_path` this folder."""

from pathlib import Path


def folder() -> Path:
    """For `--include_path`."""
    return Path(__file__).parent
