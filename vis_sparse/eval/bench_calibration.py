"""What `calibrate` costs beside plain forward passes, at full width."""

from __future__ import annotations

import statistics

FORWARD = "forward"
TEXT, ANSWER = 64, 3  # tokens of a sample: all its text, and what of it is the answer
SAMPLES = 16  # effects are measured on two of them: one in eight, as of many samples


def bench_calibration(
    model: str = "llava-1.5-7b",
    *,
    layers: int = 2,
    samples: int = SAMPLES,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 3,
    on_turn=lambda done, total: None,
) -> list[dict]:
    """Figures of plain forward passes, and of `calibrate` with each kind of head scores on the same samples.

    model: a shipped shape or a checkpoint folder (for its sizes; the weights are random, the vision tower is a toy, the
    forward passes leave the LM head out). samples: each with as many visual tokens as the model's usual image has.
    on_turn(done, total): called after each timed turn.

    Seconds are of all samples together, medians over rounds in turns; ratio: to the forward passes, median over rounds;
    flops: counted in a run that is not timed.
    """
    import dataclasses

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..calibration.measure import SCORES, calibrate
    from ..cost.shape_lookup import load_shape
    from .bench_model import image_samples, random_model
    from .timing import in_turns, machine_facts, paired_ratio, timed

    shape, place = dataclasses.replace(load_shape(model), layers=layers), torch.device(device)
    built = random_model(shape, getattr(torch, dtype), place)
    given = image_samples(built, shape, samples, TEXT, ANSWER)

    @torch.no_grad()
    def forward():
        for sample in given:
            built.model(**{name: value for name, value in sample.items() if name != "labels"}, use_cache=False)

    ways = {FORWARD: forward} | {name: lambda name=name: calibrate(built, given, scores=name) for name in SCORES}
    counted = {}
    for name, way in ways.items():
        with FlopCounterMode(display=False) as counter:
            way()
        counted[name] = counter.get_total_flops()

    def turn(name: str) -> dict[str, float]:
        return {"s": timed(ways[name], place)}

    times = {name: series["s"] for name, series in in_turns(list(ways), turn, repeats, on_turn).items()}
    setting = {"model": shape.name, "layers": layers, "samples": samples, "dtype": dtype, "repeats": repeats}
    setting["visual_tokens"] = int((given[0]["input_ids"] == built.config.image_token_index).sum())
    return [
        {
            "way": name,
            **setting,
            "s": statistics.median(series),
            "spread": [min(series), max(series)],
            "ratio": paired_ratio(series, times[FORWARD]),
            "flops": counted[name],
            "flop_ratio": counted[name] / counted[FORWARD],
            **machine_facts(place),
        }
        for name, series in times.items()
    ]
