"""Small trained models, shipped with their data, their training and their scorer."""

from pathlib import Path

NAMES = ("llava", "qwen2_vl", "internvl")
DEEP = "smol"  # with a real pretrained decoder, whose own weights come from another package (extra `deep`)
ADAPTED = tuple(f"{DEEP}-{plan}" for plan in ("still",))  # the deep one, fine-tuned under a plan
SHIPPED = {f"tiny/{name}": name for name in (*NAMES, DEEP, *ADAPTED)}  # what commands call them


def checkpoint(family: str = "llava") -> Path:
    """Folder of a trained checkpoint, for `from_pretrained`: "llava" (3.0 M parameters, 144 visual tokens an image),
    "qwen2_vl" (3.6 M, 100 to 168 visual tokens), "internvl" (3.1 M, 36 to 180: tiles and a thumbnail), "smol" (136 M,
    144), or "smol-still" and others of `ADAPTED`: "smol" with its adapter for a plan, which the checkpoint carries.

    Those of "smol" are in the user's cache, made on first use. Raises ModuleNotFoundError with the line to install what
    they need.
    """
    if family in (DEEP, *ADAPTED):
        from vis_sparse.eval.tiny.smol_files import cached

        return cached(family.removeprefix(f"{DEEP}-") if family in ADAPTED else None)
    return Path(__file__).parent / family
