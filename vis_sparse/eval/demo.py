"""The demo's measurements: a shipped tiny model on held-out questions, dense and under plans."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from transformers import AutoProcessor

import vis_sparse

from ..calibration.profiles import Target
from ..cost.shape_lookup import shape_of
from ..cost.shapes import ModelShape
from ..layout.layout import VisualLayout
from ..patches.calibrated import checked_calibration
from ..plans.budgets import resolve_heads, resolve_tower
from ..plans.files import as_plan
from ..plans.plan import VisualPlan
from ..plans.scores import Calibration
from .layer_work import layer_work
from .measure import Measurement
from .timing import machine_facts
from .tiny import DEEP, checkpoint
from .tiny.data import Question
from .tiny.dialogs import questions
from .tiny.families import FAMILIES, grid_of, kinds_of
from .tiny.score import answers, prepared

PLANS, OF_THE_TOWER = ("auto", "yopo-25", "yopo-12"), "whole-50"
DENSE, BLIND = "dense", "blind"
BATCH = 25  # questions answered at once
TIMED, REPEATS = 16, 15  # questions in the timed prompt, and turns
DEEP_TIMED, DEEP_REPEATS = 2, 3  # of a model fifty times as large
_COUNTED = ("flops", "decoder_flops", "flops_visual", "kv_bytes", "peak_bytes")


def run_demo(
    num_questions: int,
    family_name: str = "llava",
    on_step: Callable[[int, int], None] = lambda done, total: None,
    calibration: Path | None = None,
) -> dict:
    """Answer, time and count. Returns the demo's figures as plain data (see `_costs`, `_example`).

    num_questions: in all, spread evenly over the kinds of question. family_name: of `tiny.families`.
    on_step(done, total): called after each batch of answers and each timed turn. calibration: file that says which
    heads and neurons budgets keep; None: the shipped one. The plan for the vision tower too is asked where it has
    measured one.
    """
    family, folder = FAMILIES[family_name], checkpoint(family_name)
    model = family.MODEL.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    shape = shape_of(model)
    target = Target.of(model)
    calibration = checked_calibration(
        calibration or folder / "heads.safetensors", model, target.text_model, target.decoder
    )
    names = PLANS if calibration.tower is None else (*PLANS, OF_THE_TOWER)
    plans = {name: _resolved(name, shape, calibration) for name in names}
    variants = {DENSE: VisualPlan.dense(shape.layers), **plans, BLIND: VisualPlan.vtw(shape.layers, 0)}
    kinds = kinds_of(family)
    per_kind = max(1, num_questions // len(kinds))
    asked = [question for kind in kinds for question in questions(kind, per_kind, sizes=family.SIZES)]
    batch, repeats = (DEEP_TIMED, DEEP_REPEATS) if family_name == DEEP else (TIMED, REPEATS)
    # One size, so that nothing is padded: the largest.
    timed = questions("place", batch, sizes=family.SIZES[-1:])
    width, height = timed[0].image.size
    measurement = Measurement(model, prepared(model, processor, timed), (height, width), plans)
    batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
    done, total = 0, len(variants) * len(batches) + repeats * len(measurement.variants)

    def step():
        nonlocal done
        done += 1
        on_step(done, total)

    def answered(name: str) -> list[str]:
        if name != DENSE:
            vis_sparse.patch(model, variants[name])
        given = []
        for batch in batches:
            given += answers(model, processor, batch)
            step()
        vis_sparse.unpatch(model)
        return given

    given = {name: answered(name) for name in variants}
    figures = measurement.run(repeats, on_turn=step)
    one = VisualLayout(1, tuple(segment for segment in measurement.layout.segments if segment.sample == 0))
    text_tokens = measurement.text_tokens
    drawn = one.segments[-1]
    return {
        "model": {
            "family": family_name,
            "name": family.TITLE,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "layers": shape.layers,
            "heads": shape.heads,
            "grid": [drawn.height, drawn.width],
            "has_tiles": len(one.segments) > 1,
            "visual_tokens": _fewest_and_most(asked, family),
            "image_png": _png(timed[0].image),
        },
        "questions": {kind: per_kind for kind in kinds},
        "timed": {"batch": batch, "visual_tokens": one.num_visual, "text_tokens": text_tokens, "repeats": repeats},
        "plans": [
            {
                "plan": name,
                "about": plan.about,
                "accuracy": _accuracy(asked, given[name]),
                "same_as_dense": _share(a == b for a, b in zip(given[name], given[DENSE], strict=True)),
                **_costs(name, figures, batch),
                "layers": layer_work(shape, plan, one, text_tokens),
            }
            for name, plan in variants.items()
            if name != BLIND
        ],
        "blind": _accuracy(asked, given[BLIND]),
        "examples": [
            # another size of image each time, where there are several
            _example(asked, given, index * per_kind + index % min(per_kind, len(family.SIZES) or 1))
            for index in range(len(kinds))
        ],
        **machine_facts(model.device),
    }


def _resolved(name: str, shape: ModelShape, calibration: Calibration) -> VisualPlan:
    plan = resolve_heads(as_plan(name, shape.layers), shape.heads, shape.kv_heads, calibration=calibration)
    vision = shape.vision
    return resolve_tower(plan, vision.layers, vision.heads, vision.ffn, None, calibration.tower)


def _costs(name: str, figures: dict[str, dict], batch: int) -> dict:
    """FLOPs, bytes and seconds of one of `batch` questions' prefill, whole and of the decoder alone; the unpatched
    model's for `DENSE`."""
    own = figures[PLANS[0] if name == DENSE else name]
    suffix, timed = ("_dense", "dense_s") if name == DENSE else ("", "patched_s")
    costs = {key: own[key + suffix] // batch for key in _COUNTED}
    for part in ("", "decoder_"):
        costs[f"{part}prefill_s"] = own[part + timed] / batch
        costs[f"{part}prefill_spread_s"] = [value / batch for value in own[f"{part}spread"][timed]]
        costs[f"{part}speedup"] = 1.0 if name == DENSE else own[f"{part}speedup_paired"]
    return costs


def _accuracy(asked: Sequence[Question], given: Sequence[str]) -> dict[str, float]:
    return {
        kind: _share(words == q.answer for q, words in zip(asked, given, strict=True) if q.kind == kind)
        for kind in dict.fromkeys(question.kind for question in asked)
    }


def _share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def _example(asked: Sequence[Question], given: dict[str, list[str]], index: int) -> dict:
    question = asked[index]
    return {
        "kind": question.kind,
        "image_png": _png(question.image),
        "image_size": list(question.image.size),
        "question": question.text,
        "answer": question.answer,
        "given": {name: words[index] for name, words in given.items()},
    }


def _fewest_and_most(asked: Sequence[Question], family: ModuleType) -> list[int]:
    """Visual tokens of an image."""
    tokens = [len(family.places(grid_of(question.image, family))) for question in asked]
    return [min(tokens), max(tokens)]


def _png(image: Image.Image) -> str:
    """The image as a base64 PNG."""
    png = io.BytesIO()
    image.save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()
