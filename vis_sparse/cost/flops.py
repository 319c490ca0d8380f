"""FLOPs and KV-cache bytes of a plan, from the model's shape and the batch's layout. Nothing is run.

Conventions (a multiply-add is 2 FLOPs unless said otherwise):

- `executed`: what the patched model does, text included, from the same `schedule` as the executor. Projections and
  FFN are exact; scores are the ideal number, each pair that is really read counted once. Where a plan drops tokens by
  their scores, evenly spaced ones stand in for those that stay: their number is exact, their places decide pairs alone.
  How many leave as duplicates of their neighbours only pixels know: a share is told.
- `paper` (arXiv 2410.06169): visual tokens only, 2(4nd^2 + 2n^2 d + 3ndm) a layer, scaled by the plan.
- `macs`: multiply-adds, half of `paper`. `fastv`: multiply-adds with 2ndm for the FFN (arXiv 2403.06764).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from ..executor.tokens import entering
from ..layout.image_grids import EncodedImage, Grid, ShapeError
from ..layout.layout import LayoutError, VisualLayout
from ..layout.packing import visual_coordinates
from ..plans.budgets import resolve_heads, resolve_tower
from ..plans.files import as_plan
from ..plans.layer_plan import PlanError, brief, is_number
from ..plans.plan import PlanRecipe, VisualPlan
from ..plans.schedule import schedule
from ..plans.scores import Calibration, TowerScores
from .conventions import executed, fastv, macs, paper, tokens_by_layer
from .report import CostReport
from .shape_config import MODEL_TYPES
from .shape_lookup import as_shape
from .shapes import ModelShape
from .tower import patch_embedding, tower_layers

if TYPE_CHECKING:
    from torch import nn

CONVENTIONS = {"executed": executed, "paper": paper, "macs": macs, "fastv": fastv}


def flops(
    model: ModelShape | str | Path | nn.Module,
    plan: VisualPlan | PlanRecipe | str | Path,
    *,
    layout: VisualLayout | None = None,
    text_tokens: int = 64,
    text_before: int = 35,
    images: int | None = None,
    image_size: tuple[int, int] | None = None,
    video_frames: int = 0,
    batch: int = 1,
    convention: str = "executed",
    heads: str | Path | ArrayLike | None = "first",
    kv_dtype_bytes: int = 2,
    executed_scores: int | None = None,
    duplicates: float = 0.0,
) -> CostReport:
    """Count `plan` on `model`: a `ModelShape`, a shipped name, a checkpoint folder, or a live transformers model.

    layout: where the visual tokens lie, positions without padding; by default each sample has `images` images of
    `image_size` (height, width) pixels in a row after `text_before` text tokens, then a video of `video_frames`
    sampled frames of that size, if any; images is 1 by default, 0 with a video. With a layout, the vision tower and the
    projector are not counted: it doesn't say what they ran. text_tokens: text tokens of a sample in all. batch:
    samples; a given layout is repeated to fill it. heads: as in `resolve_heads`; the default lets the first heads
    stand in for a budget's. kv_dtype_bytes: bytes of a cached value. duplicates: share in [0, 1) of the visual tokens
    that leaves where a plan lets them leave by duplicate; no size tells it.

    Under "executed", plan "dense" is the whole unpatched model, causal scores n(n+1)/2; its vision tower runs the
    layers behind the feature layer too, which a plan with a tower section does not. The other conventions have no
    grouped KV heads (MHA of the model's width), and charge nothing after the last layer in which text reads visual
    tokens, whatever the plan's semantics.

    Raises PlanError, LayoutError or ShapeError.
    """
    if convention not in CONVENTIONS:
        raise PlanError(f"convention: got {brief(convention)}, expected one of {', '.join(CONVENTIONS)}")
    if not is_number(duplicates) or not 0 <= duplicates < 1:
        raise PlanError(f"duplicates: got {brief(duplicates)}, expected a share in [0, 1)")
    shape = as_shape(model)
    plan = resolve_heads(as_plan(plan, shape.layers), shape.heads, shape.kv_heads, heads)
    plan.check_fits(shape.layers, shape.heads, shape.ffn)
    plan = _with_tower(shape, plan)
    encoded = ()
    if layout is None:
        encoded = _encode(shape, images, image_size, video_frames)
        layout = _in_a_row([grid for image in encoded for grid in image.grids], text_tokens, text_before)
    if batch != 1:
        layout = layout.expanded(batch)
        encoded *= batch
    coming = visual_coordinates(layout)
    if plan.before is not None:
        coming = coming.take(entering(plan.before, coming, duplicates=duplicates))
    prefill, decode = CONVENTIONS[convention](shape, plan, layout, text_tokens, coming)
    tower_rows = 0
    if decode is not None:
        lm_head = 2 * layout.batch_size * shape.hidden * shape.vocab
        decode = dataclasses.replace(decode, lm_head=lm_head)
        prefill = dataclasses.replace(prefill, lm_head=lm_head)
        if encoded and shape.vision:
            prefill = dataclasses.replace(prefill, **_apart(shape, plan, encoded, duplicates))
            grids = [grid for image in encoded for grid in image.sequences]
            tower_rows = sum(height * width + shape.vision.class_token for height, width in grids)
            if plan.before is not None and plan.before.by == "duplicate":
                tower_rows = int(tower_rows * (1 - duplicates))
        prefill = dataclasses.replace(prefill, choosing=_choosing(shape, plan, layout))
    work = schedule(plan, shape.heads, shape.kv_heads, shape.ffn)
    by_layer = tokens_by_layer((item.tokens for item in work), layout, text_tokens, coming)
    left = tuple(tokens.rows for tokens in by_layer)
    per_head = 2 * shape.head_dim * kv_dtype_bytes  # K and V
    visual_heads = sum(rows * len(item.key_heads) for rows, item in zip(left, work, strict=True) if item.stores)
    return CostReport(
        model=shape.name,
        plan=plan.name,
        convention=convention,
        batch=layout.batch_size,
        visual_tokens=layout.num_visual,
        text_tokens=layout.batch_size * text_tokens,
        visual_left=left,
        prefill=prefill,
        decode=decode,
        kv_text_bytes=per_head * layout.batch_size * text_tokens * shape.kv_heads * shape.layers,
        kv_visual_bytes=per_head * visual_heads,
        tower_rows=tower_rows,
        executed_scores=executed_scores,
    )


def resolved(plan: str, shape: ModelShape, calibration: Path | None) -> VisualPlan:
    """A plan (name or file) for a model, its budgets resolved by the calibration; without one the first heads and
    neurons stand in, whose numbers are right."""
    heads, tower = "first", None
    if calibration is not None:
        heads, calibration = None, Calibration.load(calibration)
        calibration.check_fits(shape.layers, shape.heads, shape.kv_heads, shape.ffn)
        tower = calibration.tower
    chosen = resolve_heads(as_plan(plan, shape.layers), shape.heads, shape.kv_heads, heads, calibration)
    return _with_tower(shape, chosen, tower)


def _encode(
    shape: ModelShape, images: int | None, image_size: tuple[int, int] | None, video_frames: int
) -> tuple[EncodedImage, ...]:
    if shape.image is None:
        raise ShapeError(
            f"model: {shape.name} has no rule from image sizes to visual tokens, expected layout= or a model of type "
            f"{', '.join(MODEL_TYPES)}"
        )
    if images is None:
        images = 0 if video_frames else 1
    height, width = image_size or shape.image.default_size
    if images < 0 or height < 1 or width < 1:
        raise ShapeError(f"images: got {images} of {height} x {width} pixels, expected a count >= 0 and sides >= 1")
    encoded = shape.image.encode_several(images, height, width)
    if video_frames < 0:
        raise ShapeError(f"video_frames: got {video_frames}, expected a count >= 0")
    if not video_frames:
        return encoded
    if shape.video is None:
        raise ShapeError(f"video_frames: got {video_frames}, expected 0: {shape.name} has no rule for videos")
    return (*encoded, shape.video.encode(video_frames, height, width))


def _in_a_row(grids: list[Grid], text_tokens: int, text_before: int) -> VisualLayout:
    """One sample with `grids` one after the other behind `text_before` text tokens."""
    if not 0 <= text_before <= text_tokens:
        raise LayoutError(f"text_before: got {text_before}, expected 0 to the {text_tokens} text tokens")
    placed, position = [], text_before
    for frames, height, width in grids:
        placed.append((position, (frames, height, width)))
        position += frames * height * width
    return VisualLayout.from_grids([placed])


def _with_tower(shape: ModelShape, plan: VisualPlan, scores: TowerScores | None = None) -> VisualPlan:
    """`plan` with its tower section resolved for the model's encoder; without scores the first heads stand in for a
    budget's."""
    if plan.tower is None:
        return plan
    if shape.vision is None:
        raise PlanError(
            f"plan {plan.name!r}: tower: got a section for {shape.name}, whose encoder is not described, expected a "
            "model with one"
        )
    vision = shape.vision
    heads = "first" if scores is None else None
    return resolve_tower(plan, vision.layers, vision.heads, vision.ffn, heads, scores)


def _choosing(shape: ModelShape, plan: VisualPlan, layout: VisualLayout) -> int:
    """By relevance: the tokens of a segment against one another, and each one taken against those before it."""
    if plan.before is None or not plan.before.reads_text:
        return 0
    sizes = [(segment.size, plan.before.count(segment.size)) for segment in layout.segments]
    return sum(2 * size**2 * shape.hidden + size * taken * (taken - 1) for size, taken in sizes)


def _apart(shape: ModelShape, plan: VisualPlan, encoded: tuple[EncodedImage, ...], duplicates: float) -> dict:
    """The fields of a `PassCost` for what comes before the decoder."""
    grids = [grid for image in encoded for grid in image.sequences]
    tower, before = plan.tower, plan.before
    if before is not None and before.needs_tower:
        tower = tower or VisualPlan.dense(shape.vision.layers)
        leaving = duplicates if before.by == "duplicate" else 0.0
        layers = tower_layers(shape.vision, tower, grids, leaving, before.by == "received")
    else:
        layers = tower_layers(shape.vision, tower, grids)
    rows = sum(image.projected for image in encoded)
    return {
        "tower_layers": layers,
        "vision_tower": patch_embedding(shape.vision, grids) + sum(layer.total for layer in layers),
        "projector": 2 * rows * sum(inputs * outputs for inputs, outputs in shape.projector),
    }
