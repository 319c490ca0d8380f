"""`calibrate`: what a dense model's visual tokens need, measured in one pass over samples (arXiv 2410.06169)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from ..plan import PlanError
from .records import SampleError
from .result import Calibration
from .running import Sums

SCORES = ("effects", "mass")


def calibrate(
    model,
    samples: Iterable[dict],
    *,
    scores: str = "effects",
    sensitivity: bool = False,
    max_new_tokens: int = 16,
    out: str | Path | None = None,
    on_sample: Callable[[int], None] | None = None,
    data: str = "",
) -> Calibration:
    """Measure a dense (unpatched) model on samples, one at a time.

    samples: model inputs of one sequence each (`samples.encode` makes them), with `labels` at the answer's tokens;
    without labels the model's own greedy answer of at most `max_new_tokens` tokens is taken. scores: what the head
    scores are, "effects" (a backward pass for each sample) or "mass" (the paper's score, from the forward pass alone).
    sensitivity: also measure what each layer is to the answers (three partial passes a layer for each sample). out:
    the file to write the result to; a run that is interrupted leaves its sums in `out.partial`, from which the same
    run goes on with the same result. on_sample(done): called after each sample. data: a name for the metadata.

    Memory does not grow with the samples but for `ratios`, 4 bytes for each head of a sample. Raises PatchError for a
    model that is patched or not supported, SampleError for a sample without visual tokens or answer.
    """
    from .effects import head_effects
    from .probe import sensitivities
    from .profiles import Target, column_norms, profile
    from .samples import answered, on_device

    if scores not in SCORES:
        raise PlanError(f"scores: got {scores!r}, expected one of {', '.join(SCORES)}")
    target = Target.of(model)
    norms = column_norms(target)
    facts = _facts(target, data, max_new_tokens) | {"scores": scores, "sensitivity": str(sensitivity)}
    sums = Sums(None if out is None else f"{out}.partial", facts, keep="ratios")
    for index, sample in enumerate(samples):
        if sums.knows(index, sample):
            continue
        try:
            sample = answered(model, on_device(sample, model), max_new_tokens)
            measured = vars(profile(target, sample, norms))
            measured["effects"] = head_effects(target, sample) if scores == "effects" else measured["ratios"] * 0
            if sensitivity:
                measured["sensitivity"] = sensitivities(target, sample)
            sums.add({name: value.numpy() for name, value in measured.items()})
        except SampleError as error:
            raise SampleError(f"sample {index}: {error}") from None
        if on_sample is not None:
            on_sample(sums.done)
    if not sums.done:
        raise SampleError("samples: got none, expected one at least")
    means = sums.means()
    means["mass"] = means.pop("ratios")
    calibration = Calibration(heads=means[scores], ratios=sums.kept, **means, metadata=facts)
    if out is not None:
        calibration.save(out)
        sums.forget()
    return calibration


def _facts(target, data: str, max_new_tokens: int) -> dict[str, str]:
    from .fingerprint import of_weights

    decoder = target.decoder
    return {
        "model": Path(getattr(target.model.config, "_name_or_path", "")).name,
        "class": type(target.model).__name__,
        "weights": of_weights(target.text_model),
        "heads": str(decoder.num_heads),
        "kv_heads": str(decoder.num_kv_heads),
        "data": data,
        "max_new_tokens": str(max_new_tokens),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
