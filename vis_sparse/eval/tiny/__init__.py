"""Small trained models, shipped with their data, their training and their scorer."""

from pathlib import Path

NAMES = ("llava", "qwen2_vl")


def checkpoint(family: str = "llava") -> Path:
    """Folder of a trained checkpoint, for `from_pretrained`: "llava" (3.0 M parameters, 144 visual tokens an image) or
    "qwen2_vl" (3.6 M parameters, 100 to 168 visual tokens an image)."""
    return Path(__file__).parent / family
