"""Documents and scoring of the tasks in this folder: held-out questions of the tiny checkpoints.

lmms-eval imports this file by its path, once for every name that a task's YAML takes from it. The data sets are names
too, `<kind>_data`: reading one gives the arguments of `datasets.load_dataset`, and makes its file first if need be.
`<kind>_framed_data` has the same questions about images of several sizes in frames, as the tiny Qwen2-VL knows them,
`<kind>_tiled_data` of the sizes that the tiny InternVL knows; `<kind>_half_data` and `<kind>_quarter_data` are the
Qwen2-VL's images shrunk to that share of their area. `reading_data` has pages of words, as the deep model knows them;
`talks_data` conversations whose later turns lean on earlier ones, about pages, grids and easy-VQA images.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from importlib.metadata import version
from pathlib import Path

QUESTIONS = 1000  # of each kind
CONVERSATIONS, TURNS = 250, 4
# variant -> whose image sizes, and the share of the area that is left of them
VARIANTS = {
    "framed": ("qwen2_vl", 1), "half": ("qwen2_vl", 0.5), "quarter": ("qwen2_vl", 0.25), "tiled": ("internvl", 1),
}  # fmt: skip


def __getattr__(name: str) -> dict:
    kind, found, rest = name.partition("_data")
    if not found or rest:
        raise AttributeError(name)
    return {"data_files": {"test": str(_parquet(kind))}}


def _parquet(kind: str) -> Path:
    """The file with the documents of a kind, made on first use."""
    from vis_sparse.eval.cache import cache_folder

    path = cache_folder("tasks") / f"{kind}-{made_by()[:12]}.parquet"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        makers = {"turns": _conversations, "talks": _talks}
        (makers[kind]() if kind in makers else _questions(kind)).to_parquet(unfinished)
        unfinished.replace(path)
    return path


def made_by() -> str:
    """Hex digest of what the documents and the scoring of all these tasks are made by: code, definitions, the sizes of
    the images that the small models know, and the packages that images come from."""
    from vis_sparse.eval.tiny import data, dialogs, reading
    from vis_sparse.eval.tiny.families import FAMILIES

    digest = hashlib.sha256("".join(inspect.getsource(module) for module in (data, reading, dialogs)).encode())
    for file in sorted(Path(__file__).parent.iterdir()):
        if file.is_file():
            digest.update(file.read_bytes())
    sizes = {name: family.SIZES for name, family in FAMILIES.items()}
    versions = [version(package) for package in ("easy_vqa", "matplotlib", "scikit-learn", "numpy", "pillow")]
    digest.update(repr((sizes, versions)).encode())
    return digest.hexdigest()


def _questions(kind: str):
    from vis_sparse.eval.tiny.dialogs import questions
    from vis_sparse.eval.tiny.families import FAMILIES

    name, _, variant = kind.rpartition("_")
    if variant in VARIANTS:
        family, area = VARIANTS[variant]
    else:
        name, family, area = kind, "llava", 1
    asked = questions(name, QUESTIONS, sizes=FAMILIES[family].SIZES)
    images = [_shrunk(question.image, area) for question in asked]
    return _dataset(images, question=[q.text for q in asked], answer=[q.answer for q in asked])


def _shrunk(image, area: float):
    """The image at about the share `area` of its area, in whole visual tokens of 8 x 8 pixels."""
    if area == 1:
        return image
    return image.resize([max(1, round(side * area**0.5 / 8)) * 8 for side in image.size])


def _conversations():
    """Grids of test digits with several questions each."""
    import numpy as np

    from vis_sparse.eval.tiny.data import grid_scene

    rng = np.random.default_rng(0)
    scenes = [grid_scene(rng, TURNS, "test") for _ in range(CONVERSATIONS)]
    asked = [[question.text for question in scene.questions] for scene in scenes]
    answers = [[question.answer for question in scene.questions] for scene in scenes]
    return _dataset([scene.image for scene in scenes], questions=asked, answers=answers)


def _talks():
    from vis_sparse.eval.tiny.dialogs import conversations

    talks = conversations(CONVERSATIONS)
    asked = [[turn.text for turn in talk.turns] for talk in talks]
    answers = [[turn.answer for turn in talk.turns] for talk in talks]
    return _dataset([talk.image for talk in talks], questions=asked, answers=answers)


def _dataset(images, **columns):
    from datasets import Dataset, Image

    return Dataset.from_dict({"image": list(images), **columns}).cast_column("image", Image())


def doc_to_visual(doc) -> list:
    return [doc["image"].convert("RGB")]


def exact_match(doc, results) -> dict[str, float]:
    return {"exact_match": float(results[0] == doc["answer"])}


def ask(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    """The next question of a conversation, as lmms-eval wants it: (images, text, is over, answers, state)."""
    if round_idx is None:
        return doc["questions"][0]
    if round_idx == len(doc["questions"]):
        return None, None, True, previous_output, previous_round_info
    images = [] if round_idx else doc_to_visual(doc)
    return images, doc["questions"][round_idx], False, previous_output, previous_round_info


def turns_match(doc, results) -> dict[str, float]:
    """Share of a conversation's questions answered exactly; of its first and of its later ones."""
    given = results[0] or [""] * len(doc["answers"])
    right = [float(a == b) for a, b in zip(given, doc["answers"], strict=True)]
    return {
        "exact_match": sum(right) / len(right),
        "first_turn": right[0],
        "later_turns": sum(right[1:]) / len(right[1:]),
    }
