"""The result of a calibration: data, one safetensors file, and the heads that a budget keeps by its scores."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .atomic_write import is_file
from .hub import located
from .layer_plan import HeadBudget, PlanError
from .tensor_file import read_tensors, write_tensors

CALIBRATION_FILE = "calibration.safetensors"  # of a repository that holds one


@dataclass(frozen=True)
class TowerScores:
    """What a calibration measured in a vision encoder; patches are its visual rows. L layers, H heads of its own.

    heads (L, H): effects (`effects.tower_effects`; 1 in all). neurons (L, neurons), sensitivity (L, 3) or None: as in
    `Calibration`, neighbours in both directions.
    """

    heads: np.ndarray
    neurons: np.ndarray
    sensitivity: np.ndarray | None = None


@dataclass(frozen=True)
class Calibration:
    """Measurements over samples, on the dense model. Arrays are float32 unless said otherwise; L layers, H heads.

    heads (L, H): the head scores that budgets are resolved from, `effects` or `mass` (metadata "scores" says which).
    ratios (samples, L, H): attention mass on visual keys over the mass on all other keys at the rows that predict a
    sample's answer; mass (L, H) is their mean. effects (L, H): how much the answer's log-probability depends on the
    visual tokens in the head (`effects.head_effects`; 1 in all), zeros if that was not measured. text_mass (L,): visual
    share of the attention of text rows after the first image. attention_change, ffn_change (L, 2): of visual rows,
    cosine before and after the part and relative norm of what it adds. neurons (L, neurons): mean |activation| of
    visual rows times the norm of the neuron's output column. sensitivity (L, 3), None if it was not measured:
    KL(dense || plan) of the answer's tokens (nats) when that layer alone is off for visual tokens, attends to
    neighbours only, skips its FFN (`probe.SENSITIVITY`). metadata: model, data, sizes and versions, text to text.
    tower: the same of the vision encoder, None if it was not measured.
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
    tower: TowerScores | None = None

    @property
    def num_samples(self) -> int:
        return len(self.ratios)

    def check_fits(self, num_layers: int, num_heads: int, num_kv_heads: int, num_neurons: int) -> None:
        """Raise PlanError naming both models if this is the calibration of one of other sizes."""
        expected = {"layers": num_layers, "heads": num_heads, "KV heads": num_kv_heads, "neurons": num_neurons}
        given = dict(zip(("layers", "heads"), self.heads.shape)) | {"neurons": self.neurons.shape[1]}
        if "kv_heads" in self.metadata:
            given["KV heads"] = int(self.metadata["kv_heads"])
        for name, count in given.items():
            if count != expected[name]:
                given = f"those of {origin(self.metadata)} with {count} {name}"
                raise PlanError(f"calibration: got {given}, expected the model's {expected[name]}")

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
        cut = [layer for layer in range(len(self.heads)) if layer not in set(whole)]
        masks = np.ones(self.heads.shape, dtype=bool)
        masks[cut] = keep_heads(self.heads[cut], HeadBudget(keep, by, over), int(self.metadata["kv_heads"]))
        return masks

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, at once: an interrupted save leaves the old file."""
        tensors = {name: getattr(self, name) for name in _SIZES}
        if self.tower is not None:
            tensors |= {TOWER + name: array for name, array in vars(self.tower).items()}
        write_tensors(path, {name: array for name, array in tensors.items() if array is not None}, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote: a file, or a repository of the Hub (OWNER/NAME) with a calibration.safetensors.

        Raises PlanError naming the file if it is missing or something else.
        """
        path = located(path, (CALIBRATION_FILE,), "calibration")
        try:
            if not is_file(path):
                raise ValueError("there is none")
            tensors, metadata = read_tensors(path)
            own = {name: array for name, array in tensors.items() if not name.startswith(TOWER)}
            _check(own, metadata)
            tower = {name.removeprefix(TOWER): tensors[name] for name in tensors.keys() - own.keys()}
            if tower:
                _check_sizes(tower, _OF_TOWER)
        except ValueError as error:
            raise PlanError(f"calibration: {path}: expected a file that calibrate wrote ({error})") from None
        return cls(**own, metadata=metadata, tower=TowerScores(**tower) if tower else None)


# Sizes of the arrays: L layers, H heads, n samples, N neurons, or a number.
_SIZES = {
    "heads": "LH", "mass": "LH", "effects": "LH", "ratios": "nLH", "text_mass": "L", "attention_change": "L2",
    "ffn_change": "L2", "neurons": "LN", "sensitivity": "L3",
}  # fmt: skip


TOWER = "tower."  # before the names of a vision encoder's arrays
_OF_TOWER = {name: _SIZES[name] for name in ("heads", "neurons", "sensitivity")}


def _check(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Raise ValueError unless these are a calibration's arrays, of sizes that agree."""
    sizes = _check_sizes(tensors, _SIZES)
    kv_heads = metadata.get("kv_heads", "1")
    if not re.fullmatch("[1-9][0-9]{,8}", kv_heads) or sizes["H"] % int(kv_heads):
        raise ValueError(f"kv_heads is {kv_heads[:80]!r} of {sizes['H']} heads")


def _check_sizes(tensors: dict[str, np.ndarray], known: dict[str, str]) -> dict[str, int]:
    """The sizes by letter. Raises ValueError unless these are the known arrays, of sizes that agree."""
    missing = sorted(known.keys() - {"sensitivity"} - tensors.keys())
    unknown = sorted(tensors.keys() - known.keys())
    if missing or unknown:
        raise ValueError(f"without {missing[0]}" if missing else f"with a tensor {unknown[0]}")
    sizes = {"2": 2, "3": 3}
    for name, letters in known.items():
        array = tensors.get(name)
        if array is None:
            continue
        expected = tuple(sizes.setdefault(letter, size) for letter, size in zip(letters, array.shape))
        if (len(letters), expected) != (array.ndim, array.shape) or 0 in expected or array.dtype.kind not in "fiu":
            wanted = ", ".join(letter if letter.isdigit() else f"{letter}={sizes.get(letter)}" for letter in letters)
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, not numbers of ({wanted})")
        if np.isnan(array).any():
            raise ValueError(f"{name} holds NaN")
    return sizes


def origin(metadata: dict[str, str]) -> str:
    """The model that was measured, in words, as far as the metadata says."""
    name = metadata.get("model")
    return f"a {metadata.get('class') or 'model'}{f' called {name!r}' if name else ''}"


def keep_heads(scores: np.ndarray, budget: HeadBudget, num_kv_heads: int) -> np.ndarray:
    """bool (layers, heads): the heads that `budget` keeps in layers of these scores, the lower one of equal heads."""
    layers, num_heads = scores.shape
    group = num_heads // num_kv_heads if budget.by == "group" else 1
    units = scores.reshape(layers, -1, group).sum(-1)
    shared = layers if budget.over == "model" else 1
    kept = int(budget.count(num_heads, shared) / group + 0.5)
    rows = units.reshape(layers // shared, -1)
    masks = np.zeros(rows.shape, dtype=bool)
    np.put_along_axis(masks, np.argsort(-rows, axis=1, kind="stable")[:, :kept], True, axis=1)
    return masks.reshape(layers, -1).repeat(group, axis=1)
