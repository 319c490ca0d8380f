"""`vis-sparse flops`: what plans cost on a model."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..cost.flops import CostReport, flops, resolved
from ..cost.report import PARTS, PassCost
from ..cost.roofline import Roofline, device_spec, roofline
from ..cost.shape_lookup import load_shape
from ..eval.numbers import human, mebibytes
from ..eval.tables import tight_table
from ..layout.image_grids import ShapeError
from ..plans.files import shown_names
from ..plans.layer_plan import PlanError, brief
from ..plans.plan import VisualPlan
from .checks import count
from .options import CalibrationOption, ConventionOption, JsonOption, ModelOption, bar, emit


def flops_command(
    model: ModelOption = "llava-1.5-7b",
    plan: Annotated[str, typer.Option("--plan", metavar="A,B,...", help="Plans (names or files) to count.")] = "auto",
    text_tokens: Annotated[
        int, typer.Option(min=0, callback=count, help="Text tokens of a sample, those before the image too.")
    ] = 64,
    text_before: Annotated[
        int | None,
        typer.Option(
            min=0, callback=count, help="Text tokens before the first image.", show_default="35, or all there are"
        ),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Size of the images, and of a video's frames, in pixels.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=0, callback=count, help="Images in a sample.", show_default="1, or 0 with a video")
    ] = None,
    video_frames: Annotated[
        int, typer.Option(min=0, callback=count, help="Sampled frames of a video in each sample, after its images.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, callback=count, help="Samples.")] = 1,
    duplicates: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Of the visual tokens, for plans by which duplicates leave before the vision tower."
        ),
    ] = 0.0,
    convention: ConventionOption = "executed",
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also roofline bounds on a100, h100, h200 or mi300x.")
    ] = None,
    calibration: CalibrationOption = None,
    json_file: JsonOption = None,
) -> None:
    """Count the FLOPs and the KV cache of plans on a model: one by part and layer, several side by side."""
    shape = load_shape(model)
    settings = {
        "text_tokens": text_tokens,
        "text_before": min(35, text_tokens) if text_before is None else text_before,
        "image_size": pixels(image_size),
        "images": images,
        "video_frames": video_frames,
        "batch": batch,
        "convention": convention,
        "duplicates": duplicates,
    }
    dense = flops(shape, "dense", **settings)
    names = shown_names(name.strip() for name in plan.split(",") if name.strip())
    if not names:
        raise PlanError(f"plan: got {plan!r}, expected one name or several with commas between them")
    plans = [resolved(each, shape, calibration).replace(name=name) for each, name in names.items()]
    costs = [flops(shape, each, **settings) for each in plans]
    bounds = _bounds(shape, [VisualPlan.dense(shape.layers), *plans], [dense, *costs], device) if device else []
    data = [cost.to_dict() | _shares(cost, dense) for cost in costs]

    def draw(console: Console) -> None:
        first = costs[0]
        console.print(
            f"{shape.name}, batch {first.batch}, {first.visual_tokens} visual + {first.text_tokens} text tokens, "
            f"convention [bold]{convention}[/bold]"
        )
        if len(costs) == 1:
            _draw_one(console, first, dense)
        else:
            _draw_several(console, costs, dense)
        if bounds:
            _draw_bounds(console, bounds)

    result = {"model": shape.name, "plans": data, "dense": dense.to_dict()}
    if bounds:
        result["bounds"] = [bound.to_dict() for bound in bounds]
    emit(result, json_file, draw)


def _bounds(shape, plans: list[VisualPlan], costs: list[CostReport], device: str) -> list[Roofline]:
    spec = device_spec(device)
    return [roofline(shape, plan, cost, spec) for plan, cost in zip(plans, costs)]


def _draw_bounds(console: Console, bounds: list[Roofline]) -> None:
    """Bounds of prefill and of a decode step by part, the dense model's first."""
    dense, *others = bounds
    for name in ("prefill", "decode"):
        before = getattr(dense, name)
        columns = ("", *(bound.plan for bound in bounds))
        table = tight_table(*columns, left=("",), title=f"bound of {name}, ms")
        for part in before.parts:
            found = (getattr(bound, name).parts[part] for bound in bounds)
            table.add_row(part, *(f"{1e3 * b.seconds:.3f} {'F' if b.is_compute_bound else 'B'}" for b in found))
        table.add_row("bound", *(f"{1e3 * getattr(bound, name).seconds:.3f}  " for bound in bounds))
        ratios = (f"{before.seconds / getattr(bound, name).seconds:.2f}x " for bound in others)
        table.add_row("of speed-up", "", *ratios)
        console.print(table)
    console.print(
        f"Roofline of one {dense.device.name}. F: by FLOPs, B: by bytes. Bounds, not times: every weight is read once, "
        "everything else fused."
    )


def pixels(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "WxH"."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{,5})x([1-9][0-9]{,5})", text.strip().lower())
    if match is None:
        raise ShapeError(f"image-size: got {brief(text)}, expected WIDTHxHEIGHT in pixels, like 672x336")
    return int(match[2]), int(match[1])


def _shares(cost: CostReport, dense: CostReport) -> dict[str, float | None]:
    """What a plan leaves of the dense model: of the whole prefill, where all of it is counted, and of the decoder."""
    whole = cost.prefill.whole / dense.prefill.whole if dense.prefill.is_whole else None
    return {"whole_of_dense": whole, "of_dense": cost.total / dense.total if dense.total else None}


def _draw_several(console: Console, costs: list[CostReport], dense: CostReport) -> None:
    if not dense.prefill.is_whole:
        _draw_decoders(console, costs, dense)
        return
    headings = ("plan", "prefill", "of dense", "fewer", "tower", "decoder", "of it", "decode", "KV cache")
    table = tight_table(*headings, left=("plan", "of dense"))
    for cost in costs:
        shares = _shares(cost, dense)
        table.add_row(
            cost.plan,
            human(cost.prefill.whole),
            bar(shares["whole_of_dense"], 3) + Text(f" {shares['whole_of_dense']:4.0%}"),
            f"{1 / shares['whole_of_dense']:.2f}x",
            human(cost.prefill.vision_tower),
            human(cost.total),
            "-" if shares["of_dense"] is None else f"{shares['of_dense']:.0%}",
            human(cost.decode.total),
            mebibytes(cost.kv_bytes),
        )
    console.print(table)
    prefill = dense.prefill
    console.print(
        f"Prefill: from pixels to logits, with the projector's {human(prefill.projector)} and the LM head's "
        f"{human(prefill.lm_head)}, the same under every plan."
    )


def _draw_decoders(console: Console, costs: list[CostReport], dense: CostReport) -> None:
    """Side by side where a convention, or what is known of a model, has the decoder alone."""
    headings = ["plan", "visual", "text", "prefill", "of dense", "fewer", "KV cache"]
    if dense.decode:
        headings.insert(-1, "decode")
    table = tight_table(*headings, left=("plan", "of dense"))
    for cost in costs:
        share = cost.total / dense.total if dense.total else 1.0
        row = [
            cost.plan,
            human(cost.prefill.lane("visual")),
            human(cost.prefill.lane("text")),
            human(cost.total),
            bar(share, 5) + Text(f" {share:6.1%}"),
            f"{1 / share:.2f}x" if share else "-",
            mebibytes(cost.kv_bytes),
        ]
        if cost.decode:
            row.insert(-1, human(cost.decode.total))
        table.add_row(*row)
    console.print(table)
    console.print(_the_rest(dense.prefill))


def _the_rest(prefill: PassCost) -> str:
    if prefill.lm_head is None:
        return "Vision tower, projector and LM head are not counted by this convention."
    return f"Apart from the decoder: LM head {human(prefill.lm_head)}. The vision tower of this model is not described."


def whole_prefill(cost: CostReport, dense: CostReport) -> str:
    """What a plan leaves of the whole prefill and of its parts, in words."""
    own, before = cost.prefill, dense.prefill
    return (
        f"From pixels to logits {human(own.whole)} of {human(before.whole)} FLOPs "
        f"({own.whole / before.whole:.1%}): vision tower {human(own.vision_tower)} of {human(before.vision_tower)}, "
        f"projector {human(own.projector)}, decoder {human(own.total)} of {human(before.total)}, "
        f"LM head {human(own.lm_head)}" + (f", choosing among the tokens {human(own.choosing)}" if own.choosing else "")
    )


def _draw_one(console: Console, cost: CostReport, dense: CostReport) -> None:
    if cost.prefill.is_whole:
        console.print(whole_prefill(cost, dense))
    columns = [("visual", cost.prefill, "visual"), ("text", cost.prefill, "text"), ("dense plan", dense.prefill, None)]
    if cost.decode:
        columns.append(("decode step", cost.decode, None))
    names = (name for name, _, _ in columns)
    parts = tight_table("part", *names, left=("part",), title=f"plan {cost.plan}, by part")
    for part in PARTS:
        parts.add_row(part, *(human(counted.part(part, lane)) for _, counted, lane in columns))
    totals = (counted.total if lane is None else counted.lane(lane) for _, counted, lane in columns)
    parts.add_row("decoder", *map(human, totals))
    console.print(parts)

    layers = tight_table("layer", "visual", "text", "dense plan", "", left=("",), title="by layer")
    for index, (layer, before) in enumerate(zip(cost.prefill.layers, dense.prefill.layers, strict=True)):
        share = layer.total / before.total if before.total else 0.0
        numbers = map(human, (layer.visual.total, layer.text.total, before.total))
        layers.add_row(str(index), *numbers, bar(share, 16, "red") + Text(f" {share:4.0%}"))
    console.print(layers)
    share = cost.total / dense.total if dense.total else 1.0
    console.print(
        f"The decoder: {human(cost.total)} of {human(dense.total)} FLOPs ({share:.1%}), "
        f"KV cache {mebibytes(cost.kv_bytes)} of {mebibytes(dense.kv_bytes)}"
    )
    if not cost.prefill.is_whole:
        console.print(_the_rest(cost.prefill))
