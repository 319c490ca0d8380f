"""Small trained models, shipped with their data, their training and their scorer."""

from pathlib import Path

NAMES = ("llava", "qwen2_vl", "internvl")
DEEP = "smol"  # with a real pretrained decoder, whose own weights come from another package (extra `deep`)
SHIPPED = {f"tiny/{name}": name for name in (*NAMES, DEEP)}  # what commands call them


def checkpoint(family: str = "llava") -> Path:
    """Folder of a trained checkpoint, for `from_pretrained`: "llava" (3.0 M parameters, 144 visual tokens an image),
    "qwen2_vl" (3.6 M, 100 to 168 visual tokens), "internvl" (3.1 M, 36 to 180: tiles and a thumbnail) or "smol" (136 M,
    144).

    That of "smol" is in the user's cache, made on first use. Raises ModuleNotFoundError with the line to install what
    it needs.
    """
    if family == DEEP:
        from vis_sparse.eval.tiny.smol_files import cached

        return cached()
    return Path(__file__).parent / family
