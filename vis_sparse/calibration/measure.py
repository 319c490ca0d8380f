"""`calibrate`: what a dense model's visual tokens need, measured in one pass over samples (arXiv 2410.06169)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plans.layer_plan import PlanError
from ..plans.scores import TOWER, Calibration, TowerScores
from . import processes
from .records import SampleError
from .sums import Sums

if TYPE_CHECKING:
    from torch import nn

SCORES = ("effects", "mass")
_EFFECT_SHARE = 1 / 8  # of the samples; an effect costs three passes through the decoder
_GOLDEN = (5**0.5 - 1) / 2


def calibrate(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    *,
    scores: str = "effects",
    sensitivity: bool = False,
    tower: bool = False,
    max_new_tokens: int = 16,
    out: str | Path | None = None,
    on_sample: Callable[[int], None] | None = None,
    data: str = "",
) -> Calibration:
    """Measure a dense (unpatched) model on samples, one at a time.

    samples: model inputs of one sequence each (`samples.encode` makes them), with `labels` at the answer's tokens;
    without labels the model's own greedy answer of at most `max_new_tokens` tokens is taken. scores: what the head
    scores are, "effects" (measured on one sample in eight, the first and others evenly spread: 1.36 times the FLOPs of
    a forward pass in all) or "mass" (the paper's score, from the forward pass alone: 1.01 times).
    sensitivity: also measure what each layer is to the answers (three partial passes a layer for each sample). tower:
    also measure the vision encoder, for plans with a tower section; its head scores are always effects (no text is in
    it whose attention could be shared out), three passes through the whole model for one sample in eight. out: the
    file to write the result to; a run that is interrupted leaves its sums in `out.partial`, from which the same run
    goes on with the same result. on_sample(done): called after each sample. data: a name for the metadata.

    In a process group (`accelerate launch`, torchrun) each process measures its share of the same samples, and all get
    the same result; the first one writes it.

    Memory does not grow with the samples but for `ratios`, 4 bytes for each head of a sample. Raises PatchError for a
    model that is patched or not supported, SampleError for a sample without visual tokens or answer.
    """
    from ..patches.calibrated import of_weights, tower_facts
    from .effects import head_effects, recorded_calls, tower_effects
    from .probe import sensitivities
    from .profiles import Target, column_norms, profile
    from .samples import answered, on_device
    from .vision import Vision, mean_by_layer, seen_neurons, tower_column_norms

    if scores not in SCORES:
        raise PlanError(f"scores: got {scores!r}, expected one of {', '.join(SCORES)}")
    target = Target.of(model)
    vision = Vision.of(target) if tower else None
    norms = column_norms(target)
    tower_norms = None if vision is None else tower_column_norms(vision)
    facts = _facts(target, data, max_new_tokens) | {"scores": scores, "sensitivity": str(sensitivity)}
    if vision is not None:
        facts |= tower_facts(vision.module)
    if scores == "effects":
        facts["effects"] = f"of {_EFFECT_SHARE:.1%} of the samples"
    rank, count = processes.place()
    part = "" if count == 1 else f"-{rank}-of-{count}"
    # a result may be of use to a model with another vision tower, its sums are not
    exactly = facts | {"whole model": of_weights(model)}
    own = Sums(None if out is None else f"{out}.partial{part}", exactly, keep="ratios")
    for index, sample in enumerate(samples):
        if index % count != rank or own.knows(index // count, sample):
            continue
        try:
            sample = answered(model, on_device(sample, model), max_new_tokens)
            with_effects = scores == "effects" and has_effects(index)
            with ExitStack() as stack:
                calls = stack.enter_context(recorded_calls(target.text_model)) if with_effects else ()
                neurons = stack.enter_context(seen_neurons(vision)) if vision else ()
                measured = vars(profile(target, sample, norms))
            if with_effects:
                measured["effects"] = head_effects(target, sample, *calls)
            if vision is not None:
                measured[f"{TOWER}neurons"] = mean_by_layer(neurons, len(tower_norms)) * tower_norms
                if has_effects(index):
                    measured[f"{TOWER}heads"] = tower_effects(target, vision, sample)
            if sensitivity:
                measured["sensitivity"], of_tower = sensitivities(target, sample, vision)
                if vision is not None:
                    measured[f"{TOWER}sensitivity"] = of_tower
            own.add({name: value.numpy() for name, value in measured.items()})
        except SampleError as error:
            raise SampleError(f"sample {index}: {error}") from None
        if on_sample is not None:
            on_sample(own.done)
    own.check_all_known()
    sums = Sums.merged(processes.gathered(own))
    if not sums.done:
        raise SampleError("samples: got none, expected one at least")
    means = sums.means()
    means["mass"] = means.pop("ratios")
    means.setdefault("effects", np.zeros_like(means["mass"]))
    of_tower = {name.removeprefix(TOWER): means.pop(name) for name in list(means) if name.startswith(TOWER)}
    scores_of_tower = TowerScores(**of_tower) if of_tower else None
    calibration = Calibration(heads=means[scores], ratios=sums.kept, **means, metadata=facts, tower=scores_of_tower)
    if out is not None:
        if rank == 0:
            calibration.save(out)
        processes.gathered(None)  # nobody forgets before the result is safe
        own.forget()
    return calibration


def has_effects(index: int) -> bool:
    """Whether head effects are measured on the sample at `index`: a share that keeps step with no period of the data,
    such as kinds of questions in turn."""
    return -index * _GOLDEN % 1 < _EFFECT_SHARE


def _facts(target, data: str, max_new_tokens: int) -> dict[str, str]:
    from ..patches.calibrated import weight_facts

    decoder = target.decoder
    return {
        "model": Path(getattr(target.model.config, "_name_or_path", "")).name,
        "class": type(target.model).__name__,
        **weight_facts(target.text_model),
        "heads": str(decoder.num_heads),
        "kv_heads": str(decoder.num_kv_heads),
        "data": data,
        "max_new_tokens": str(max_new_tokens),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
