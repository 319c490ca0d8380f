"""Whether a calibration was made of the model that it is used for: refused where it cannot be, told where it is not."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from torch import nn

from ..executor.decoder import Decoder
from ..executor.tower import Tower
from ..plans.atomic_write import is_file
from ..plans.budgets import HEADS_FILES
from ..plans.hub import located
from ..plans.layer_plan import PlanError, brief
from ..plans.scores import Calibration, TowerScores, origin
from ..plans.tensor_file import read_tensors

_VALUES = 64  # of every parameter, spread over it
_LOWER = (torch.bfloat16, torch.float16)
_TOWER = "tower "  # before the facts of the vision encoder


def of_weights(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hex digest of the names, shapes and some values of the parameters: tells models apart, not every change.

    dtype: as if the floating parameters were of it; None: of their own.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // _VALUES)]
        if dtype is not None and values.is_floating_point():
            values = values.to(dtype)
        digest.update(f"{name} {tuple(parameter.shape)} {values.dtype}".encode())
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weight_facts(text_model: nn.Module) -> dict[str, str]:
    """What a calibration keeps to know its model's weights again, loaded in other precisions too."""
    own = _dtype(text_model)
    lower = {f"weights in {_word(dtype)}": of_weights(text_model, dtype) for dtype in _LOWER if dtype != own}
    return {"weights": of_weights(text_model), "dtype": _word(own), **lower}


def checked_calibration(
    calibration: Calibration | str | Path | None, model: nn.Module, text_model: nn.Module, decoder: Decoder
) -> Calibration | None:
    """The calibration, read if it is a file. Raises PlanError if it is of another class of models or of other sizes;
    warns if it is of other weights, which a model that was fine-tuned since has."""
    if isinstance(calibration, str | Path):
        calibration = Calibration.load(calibration)
    if not isinstance(calibration, Calibration | None):
        raise PlanError(f"calibration: got {brief(calibration)}, expected a Calibration or its file")
    if calibration is not None:
        sizes = len(decoder.layers), decoder.num_heads, decoder.num_kv_heads, decoder.ffn_size
        calibration.check_fits(*sizes)
        _check_origin("calibration", calibration.metadata, model, text_model)
    return calibration


def tower_facts(module: nn.Module) -> dict[str, str]:
    """What a calibration keeps to know its vision encoder again."""
    facts = {"class": type(module).__name__, **weight_facts(module)}
    return {_TOWER + name: text for name, text in facts.items()}


def checked_tower(calibration: Calibration | None, module: nn.Module, tower: Tower) -> TowerScores | None:
    """A calibration's scores of the vision encoder, None without. Refused and warned of as `checked_calibration`."""
    scores = None if calibration is None else calibration.tower
    if scores is None:
        return None
    given = (*scores.heads.shape, scores.neurons.shape[1])
    expected = len(tower.layers), tower.num_heads, tower.ffn_size
    if given != expected:
        raise PlanError(
            f"calibration: tower: got {given} layers, heads and neurons, expected {expected} as in the "
            f"{type(module).__name__}"
        )
    facts = calibration.metadata.items()
    known = {name.removeprefix(_TOWER): text for name, text in facts if name.startswith(_TOWER)}
    _check_origin("calibration: tower", known, module, module)
    return scores


def check_heads_file(heads, model: nn.Module, text_model: nn.Module) -> None:
    """The same for head scores in a file that calibrate wrote; their sizes are checked with the plan."""
    heads = located(heads, HEADS_FILES, "heads")
    if isinstance(heads, str | Path) and Path(heads).suffix == ".safetensors" and is_file(heads):
        try:
            known = read_tensors(heads, names=())[1]
        except ValueError as error:
            raise PlanError(f"heads: {heads}: expected a .safetensors file ({error})") from None
        _check_origin("heads", known, model, text_model)


def _check_origin(field: str, known: dict[str, str], model: nn.Module, text_model: nn.Module) -> None:
    given = origin(known)
    if known.get("class") not in (None, type(model).__name__):
        raise PlanError(f"{field}: got those of {given}, expected those of a {type(model).__name__}, the model's class")
    if _same_weights(known, text_model) is False:
        warnings.warn(
            f"vis_sparse: {field}: got those of {given} with other weights (fingerprint {known['weights'][:12]}) than "
            f"this {type(model).__name__}'s ({of_weights(text_model)[:12]}); they are used as they are, calibrate "
            "again if this model is not a fine-tuned version of that one",
            stacklevel=5,
        )


def _same_weights(known: dict[str, str], text_model: nn.Module) -> bool | None:
    """Whether a calibration's weights are the model's; None if that cannot be told."""
    parameters = list(text_model.parameters())
    if "weights" not in known or any(p.is_meta or not p.is_floating_point() for p in parameters):
        return None
    own, then = _dtype(text_model), getattr(torch, known.get("dtype", "float32"))
    if of_weights(text_model) in (known["weights"], known.get(f"weights in {_word(own)}")):
        return True
    if own != then and of_weights(text_model, then) == known["weights"]:
        return True
    told = own == then or f"weights in {_word(own)}" in known or torch.finfo(own).bits > torch.finfo(then).bits
    return False if told else None


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
