"""Time, FLOPs and bytes of plans at a model's full width, with random weights."""

from __future__ import annotations

from pathlib import Path

from ..cost.flops import resolved

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
    graphs: bool = False,
    calibration: Path | None = None,
    on_turn=None,
) -> list[dict]:
    """Figures of every plan, in the order given: the JSON objects of the command.

    model: a shipped shape or a checkpoint folder (for its sizes; the weights are random). plans: names or YAML files.
    layers: decoder layers that are built, and the same share of the vision tower's; plans are resolved for those
    depths. image_size: (height, width) in pixels. compiler: backend of torch.compile for the decoder of all variants,
    which then run one after the other; None: eager, in turns.
    graphs: patched variants run as graphs, one variant after the other too.
    calibration: file that says which heads and neurons budgets keep, of a model of this depth; None: the first ones.
    on_turn(done, total): called after each timed turn. Raises PlanError or ShapeError before anything is built.
    """
    import torch

    from ..plans.files import shown_names
    from .measure import Measurement
    from .timing import machine_facts
    from .whole_model import image_prompt, whole_config, whole_model

    config, shape = whole_config(model, layers)
    names = shown_names(plans)
    resolved_plans = {name: resolved(plan, shape, calibration) for plan, name in names.items()}
    image_size = image_size or shape.image.default_size
    shape.image.encode(*image_size)  # refused before anything is built
    place = torch.device(device)
    built = whole_model(config, getattr(torch, dtype), place)
    measurement = Measurement(
        built,
        image_prompt(built, shape, batch, text_tokens, image_size),
        image_size,
        resolved_plans,
        heads="first",
        compiler=compiler,
        graphs=graphs,
        small=image_prompt(built, shape, 1, 2, (1, 1)),
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
        "tower_layers": shape.vision.layers,
        "batch": batch,
        "image_size": list(image_size),
        "visual_tokens": measurement.layout.num_visual // batch,
        "text_tokens": text_tokens,
        "dtype": dtype,
        "repeats": repeats,
        "compiler": compiler,
        "graphs": graphs,
        "timed": "the whole prefill, pixels to logits of the last row, and in it the decoder from embeddings to norm",
    }
    facts = machine_facts(place)
    return [{"plan": name, **setting, **figures[name], **facts} for name in names.values()]


def compare(model: str, plans: list[str], *, layers: int, **settings) -> list[dict]:
    """Plans (names or files) beside other packages, at the width of `model` and `layers` deep: `peers.peers`."""
    import dataclasses

    from ..cost.shape_lookup import load_shape
    from ..plans.files import as_plan, shown_names
    from .peers import peers

    shape = dataclasses.replace(load_shape(model), layers=layers)
    return peers(shape, {name: as_plan(plan, layers) for plan, name in shown_names(plans).items()}, **settings)


def bench_train(model: str, plans: list[str], **settings) -> list[dict]:
    """A training step of plans beside the dense one: `bench_train.bench_train`."""
    from .bench_train import bench_train

    return bench_train(model, plans, **settings)
