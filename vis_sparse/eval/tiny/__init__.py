"""Small trained models, shipped with their data, their training and their scorer."""

from pathlib import Path

NAMES = ("llava", "qwen2_vl", "internvl")
SHIPPED = {f"tiny/{name}": name for name in NAMES}  # what commands call them


def checkpoint(family: str = "llava") -> Path:
    """Folder of a trained checkpoint, for `from_pretrained`: "llava" (3.0 M parameters, 144 visual tokens an image),
    "qwen2_vl" (3.6 M, 100 to 168 visual tokens) or "internvl" (3.1 M, 36 to 180: tiles and a thumbnail)."""
    return Path(__file__).parent / family
