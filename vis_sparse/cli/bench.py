"""`vis-sparse bench`: time, FLOPs and bytes of plans at a model's full width, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..eval.bench import DTYPES, bench, bench_train, compare
from ..eval.bench_vllm import EngineError, bench_vllm
from ..eval.progress import progress
from ..eval.tables import draw_bench, draw_host, draw_peers, draw_served, draw_train
from .checks import count, counts, one_of, torch_device
from .flops import pixels
from .options import CalibrationOption, JsonOption, ModelOption, emit


def bench_command(
    context: typer.Context,
    model: ModelOption = "llava-1.5-7b",
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Decoder layers to build, and the same share of the vision tower's.",
            callback=count,
            show_default="8; with --host, the model's",
        ),
    ] = None,
    plan: Annotated[str, typer.Option("--plan", metavar="A,B,...", help="Plans (names or files).")] = "yopo-12",
    batch: Annotated[int, typer.Option(min=1, help="Samples.", callback=count)] = 1,
    text_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a sample.", callback=count)] = 64,
    image_size: Annotated[str | None, typer.Option(metavar="WxH", help="Size of the image in pixels.")] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES) + ".")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every variant once.")] = 5,
    decode: Annotated[bool, typer.Option("--decode", help="Also time the decoder in a step after the prompt.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="All variants' decoders under torch.compile.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Patched models run as graphs.")] = False,
    with_peers: Annotated[
        bool, typer.Option("--peers", help="`generate` on Qwen2.5-VL beside what else can be installed, instead.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="A training step (forward, backward, SGD) instead of a prefill.")
    ] = False,
    clock: Annotated[
        str, typer.Option(help="With --train: wall, or process (seconds of all threads, where others work too).")
    ] = "wall",
    engine: Annotated[
        str,
        typer.Option(
            help="transformers, or vllm: two servers on a random LLaVA (or a folder), vLLM's own client; --plan none "
            "tells the second nothing: what the installed plug-in costs."
        ),
    ] = "transformers",
    concurrency: Annotated[
        str, typer.Option(metavar="A,B,...", help="With --engine vllm: requests at once.")
    ] = "1,4,16",
    requests: Annotated[int, typer.Option(min=1, help="With --engine vllm: requests of a round.", callback=count)] = 16,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="With --engine vllm: tokens of an answer.", callback=count)
    ] = 64,
    host: Annotated[
        bool, typer.Option("--host", help="The host's time and launches of calls of a narrow model, instead.")
    ] = False,
    scattered: Annotated[
        bool, typer.Option("--scattered", help="With --host: head budgets cut through KV groups.")
    ] = False,
    calibration: CalibrationOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time plans against the unpatched model, at full width with random weights; `kernels`: attention alone.

    The unpatched model, the dense plan and each plan run in turns (with --compile or --graphs one after the other).
    Timed is the whole prefill, from pixels to logits, and the decoder's part of it; with --train a step of training of
    the decoder, forward and backward apart. The JSON is one object for one plan, a list of objects for several.
    """
    if context.invoked_subcommand is not None:
        return
    one_of(dtype, DTYPES, "--dtype")
    torch_device(device)
    one_of(engine, ("transformers", "vllm"), "--engine")
    if engine == "vllm":
        sizes = {} if image_size is None else {"image_size": pixels(image_size)}
        sizes |= {} if layers is None else {"layers": layers}
        sizes |= {"text_tokens": text_tokens, "new_tokens": new_tokens, "requests": requests, "repeats": repeats}
        _served(model, plan, tuple(counts(concurrency, 1, "--concurrency")), sizes | {"dtype": dtype}, json_file)
        return
    names = list(dict.fromkeys(name.strip() for name in plan.split(",")))
    one_of(clock, ("wall", "process"), "--clock")
    if train:
        for option, given in (("--decode", decode), ("--compile", compiled), ("--graphs", graphs),
                              ("--peers", with_peers), ("--calibration", calibration)):  # fmt: skip
            if given:
                raise typer.BadParameter("got --train beside it, expected one of them", param_hint=option)
        with progress("training steps in turns") as on_turn:
            results = bench_train(
                model, names, layers=layers, batch=batch, text_tokens=text_tokens, image_size=pixels(image_size),
                dtype=dtype, device=device, repeats=repeats, clock=clock, on_turn=on_turn,
            )  # fmt: skip
        emit(results if len(results) > 1 else results[0], json_file, lambda console: draw_train(console, results))
        return
    if with_peers and calibration is not None:
        raise typer.BadParameter("got a file beside --peers, expected none", param_hint="--calibration")
    if compiled and graphs:
        raise typer.BadParameter("got --compile beside it, expected one of them", param_hint="--graphs")
    if scattered and not host:
        raise typer.BadParameter("got it without --host, expected both", param_hint="--scattered")
    if host:
        from ..eval.bench_host import bench_host

        settings = {"layers": layers, "batch": batch, "repeats": repeats, "scattered": scattered}
        with progress("timing in turns") as on_turn:
            results = bench_host(model, names, calibration=calibration, on_turn=on_turn, **settings)
        emit(results, json_file, lambda console: draw_host(console, results))
        return
    layers = 8 if layers is None else layers
    if with_peers:
        place = {"dtype": dtype, "device": device, "repeats": repeats}
        with progress("timing in turns") as on_turn:
            results = compare(model, names, layers=layers, text_tokens=text_tokens, on_turn=on_turn, **place)
        emit(results, json_file, lambda console: draw_peers(console, results))
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
            graphs=graphs,
            calibration=calibration,
            on_turn=on_turn,
        )
    emit(results if len(results) > 1 else results[0], json_file, lambda console: draw_bench(console, results))


def _served(model: str, plan: str, users: tuple[int, ...], settings: dict, json_file) -> None:
    folder = Path(model) if Path(model).is_dir() else None
    try:
        with progress("serving in turns") as on_turn:
            results = bench_vllm(plan, folder, concurrency=users, on_turn=on_turn, **settings)
    except EngineError as error:
        raise typer.BadParameter(str(error), param_hint="--engine") from None
    emit(results, json_file, lambda console: draw_served(console, results))
