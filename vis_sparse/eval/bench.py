"""`vis-sparse bench`: time, FLOPs and bytes of plans at a model's full width, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli.flops import pixels
from ..cli.options import CalibrationOption, JsonOption, ModelOption, report, resolved

DTYPES = ("float32", "bfloat16", "float16")


def bench(
    model: str,
    plans: list[str],
    *,
    layers: int = 8,
    batch: int = 1,
    text_tokens: int = 64,
    image_size: tuple[int, int] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 5,
    decode: bool = False,
    compiler: str | None = None,
    calibration: Path | None = None,
    on_turn=None,
) -> list[dict]:
    """Figures of every plan, in the order given: the JSON objects of the command.

    model: a shipped shape or a checkpoint folder (for its sizes; the weights are random). plans: names or YAML files.
    layers: decoder layers that are built; plans are resolved for that depth. image_size: (height, width) in pixels.
    compiler: backend of torch.compile for all variants, which then run one after the other; None: eager, in turns.
    calibration: file that says which heads and neurons budgets keep, of a model of this depth; None: the first ones.
    on_turn(done, total): called after each timed turn. Raises PlanError or ShapeError before anything is built.
    """
    import dataclasses

    import torch

    from ..shapes import load_shape
    from .bench_model import image_layout, random_embeddings, random_model
    from .measure import Measurement
    from .timing import machine_facts

    shape = dataclasses.replace(load_shape(model), layers=layers)
    layout = image_layout(shape, batch, text_tokens, image_size)
    place = {"dtype": getattr(torch, dtype), "device": torch.device(device)}
    measurement = Measurement(
        random_model(shape, **place),
        random_embeddings(shape, layout, text_tokens, **place),
        layout,
        {name: resolved(name, shape, calibration) for name in plans},
        heads="first",
        compiler=compiler,
    )
    total, done = repeats * len(measurement.variants), 0

    def turn_over():
        nonlocal done
        done += 1
        if on_turn is not None:
            on_turn(done, total)

    figures = measurement.run(repeats, decode, turn_over)
    setting = {
        "model": shape.name,
        "layers": layers,
        "batch": batch,
        "visual_tokens": layout.num_visual // batch,
        "text_tokens": text_tokens,
        "dtype": dtype,
        "repeats": repeats,
        "compiler": compiler,
        "timed": "decoder layers and final norm on input embeddings; no vision tower, projector or LM head",
    }
    facts = machine_facts(place["device"])
    return [{"plan": name, **setting, **figures[name], **facts} for name in plans]


def compare(model: str, plans: list[str], *, layers: int, **settings) -> list[dict]:
    """Plans (names or files) beside other packages, at the width of `model` and `layers` deep: `peers.peers`."""
    import dataclasses

    from ..plan_yaml import as_plan
    from ..shapes import load_shape
    from .peers import peers

    shape = dataclasses.replace(load_shape(model), layers=layers)
    return peers(shape, {name: as_plan(name, layers) for name in plans}, **settings)


def bench_command(
    context: typer.Context,
    model: ModelOption = "llava-1.5-7b",
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers to build.")] = 8,
    plan: Annotated[str, typer.Option("--plan", metavar="A,B,...", help="Plans (names or files).")] = "yopo-12",
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 1,
    text_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a sample.")] = 64,
    image_size: Annotated[str | None, typer.Option(metavar="WxH", help="Size of the image in pixels.")] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES) + ".")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every variant once.")] = 5,
    decode: Annotated[bool, typer.Option("--decode", help="Also time a decode step after the prompt.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Time all variants under torch.compile.")] = False,
    with_peers: Annotated[
        bool, typer.Option("--peers", help="`generate` on Qwen2.5-VL beside what else can be installed, instead.")
    ] = False,
    calibration: CalibrationOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time plans against the unpatched model, at full width with random weights; `kernels`: attention alone.

    The unpatched model, the dense plan and each plan run in turns (with --compile one after the other). Timed is the
    decoder on input embeddings. The JSON is one object for one plan, a list of objects for several.
    """
    if context.invoked_subcommand is not None:
        return
    import torch

    from .progress import progress
    from .tables import draw_bench, draw_peers

    if dtype not in DTYPES:
        raise typer.BadParameter(f"got {dtype!r}, expected one of {', '.join(DTYPES)}", param_hint="--dtype")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(
            f"got {device!r}, expected a device of torch ({reason})", param_hint="--device"
        ) from None
    names = list(dict.fromkeys(name.strip() for name in plan.split(",")))
    if with_peers and calibration is not None:
        raise typer.BadParameter("got a file beside --peers, expected none", param_hint="--calibration")
    if with_peers:
        place = {"dtype": dtype, "device": device, "repeats": repeats}
        with progress("timing in turns") as on_turn:
            results = compare(model, names, layers=layers, text_tokens=text_tokens, on_turn=on_turn, **place)
        report(results, json_file, lambda console: draw_peers(console, results))
        return
    with progress("timing in turns") as on_turn:
        results = bench(
            model,
            names,
            layers=layers,
            batch=batch,
            text_tokens=text_tokens,
            image_size=pixels(image_size),
            dtype=dtype,
            device=device,
            repeats=repeats,
            decode=decode,
            compiler="inductor" if compiled else None,
            calibration=calibration,
            on_turn=on_turn,
        )
    report(results if len(results) > 1 else results[0], json_file, lambda console: draw_bench(console, results))
