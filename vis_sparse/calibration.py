"""Calibration: what a dense model's visual tokens need, measured on samples (arXiv 2410.06169 for the head scores).

A `Calibration` is data, and one safetensors file; `calibrate` fills it in one pass over the samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from .plan import HeadBudget, PlanError
from .records import SampleError
from .running import Sums, read_tensors, write_tensors


@dataclass(frozen=True)
class Calibration:
    """Measurements over samples, on the dense model. Arrays are float32 unless said otherwise; L layers, H heads.

    heads (L, H): the head scores that budgets are resolved from, `effects` or `mass` (metadata "scores" says which).
    ratios (samples, L, H): attention mass on visual keys over the mass on all other keys at the rows that predict a
    sample's answer; mass (L, H) is their mean. effects (L, H): how much the answer's log-odds move when visual tokens
    begin to leave the head (`effects.head_effects`), zeros if that was not measured. text_mass (L,): visual share of
    the attention of text rows after the first image. attention_change, ffn_change (L, 2): of visual rows, cosine
    before and after the part and relative norm of what it adds. neurons (L, neurons): mean |activation| of visual rows
    times the norm of the neuron's output column. sensitivity (L, 3), None if it was not measured: KL(dense || plan) of
    the answer's tokens (nats) when that layer alone is off for visual tokens, attends to neighbours only, skips its FFN
    (`probe.SENSITIVITY`). metadata: model, data, sizes and versions, text to text.
    """

    heads: np.ndarray
    mass: np.ndarray
    effects: np.ndarray
    ratios: np.ndarray
    text_mass: np.ndarray
    attention_change: np.ndarray
    ffn_change: np.ndarray
    neurons: np.ndarray
    sensitivity: np.ndarray | None = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.ratios)

    def votes(self, threshold: float) -> np.ndarray:
        """bool (samples, L, H): the heads that a sample votes active, those with a ratio above `threshold`."""
        return self.ratios > threshold

    def elected(self, threshold: float, whole: Iterable[int] = (0, 1)) -> np.ndarray:
        """bool (L, H): the heads that most samples vote active; layers `whole` keep all (the paper's rule)."""
        masks = self.votes(threshold).mean(0) > 0.5
        masks[list(whole)] = True
        return masks

    def masks(
        self, keep: int | float, by: str = "head", over: str = "model", whole: Iterable[int] = (0, 1)
    ) -> np.ndarray:
        """bool (L, H): the heads that a `HeadBudget` of these settings keeps; layers `whole` keep all (the paper's)."""
        from .heads import keep_heads

        cut = [layer for layer in range(len(self.heads)) if layer not in set(whole)]
        masks = np.ones(self.heads.shape, dtype=bool)
        masks[cut] = keep_heads(self.heads[cut], HeadBudget(keep, by, over), int(self.metadata["kv_heads"]))
        return masks

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, at once: an interrupted save leaves the old file."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        write_tensors(path, {name: array for name, array in tensors.items() if array is not None}, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote. Raises PlanError naming the file if it is missing or something else."""
        try:
            tensors, metadata = read_tensors(path)
            return cls(**tensors, metadata=metadata)
        except (OSError, SafetensorError, TypeError) as error:
            raise PlanError(f"calibration: {path}: expected a file that calibrate wrote ({error})") from None


SCORES = ("effects", "mass")
_TENSORS = tuple(field.name for field in dataclasses.fields(Calibration) if field.name != "metadata")


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
