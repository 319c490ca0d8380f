"""Whether the weight copies that cuts keep are still what the parameters say.

A parameter's version tells little: fused optimizers, `.data`, PEFT's merge and conversions there and back change values
and raise none. So values are looked at, once a prompt: of every parameter with a copy some elements, at least one of
each row and each column of a matrix, all of a bias. An edit of single elements that raises no version may go unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import gcd
from operator import attrgetter

import torch
from torch import nn

from .bound import Bound
from .weights import CutLinear, is_plain, records_gradients


class KeptCuts:
    """The cuts of a decoder that are copies."""

    def __init__(self, cuts: Iterable[CutLinear]):
        self._cuts = [cut for cut in cuts if cut.copies]
        self._state: tuple | None = None
        self._print: list[torch.Tensor] = []
        self._plain: tuple[Bound, list, list[dict]] | None = None

    def __getstate__(self):
        return {"_cuts": self._cuts, "_state": None, "_print": [], "_plain": None}

    @property
    def bytes(self) -> int:
        return sum(cut.extra_bytes for cut in self._cuts)

    def tensors(self) -> list[torch.Tensor]:
        """All copies."""
        return [tensor for cut in self._cuts for tensor in cut.kept if tensor is not None]

    @torch.compiler.disable
    def refresh(self, bound: Bound | None = None) -> None:
        """Bring every copy up to date; none is kept of what is called whole, or while gradients are recorded for it.

        bound: the decoder's modules as they are now (`LaneExecutor.bound`), by which they need no second look.
        """
        if self._plain is None or bound is not self._plain[0] or torch.is_grad_enabled():
            used, held = self._used()
            self._plain = None if bound is None or torch.is_grad_enabled() else (bound, used, held)
        else:
            _, used, held = self._plain
        parameters = [p for each in held for p in (each["weight"], each["bias"]) if p is not None]
        state = (tuple(id(cut) for cut, _ in used), *map(_state_of, parameters))
        seen = fingerprint(parameters)
        if state != self._state or not _equal(seen, self._print):
            for cut, found in used:
                cut.keep(found)
            self._state, self._print = state, seen

    def _used(self) -> tuple[list[tuple[CutLinear, list[nn.Module]]], list[dict]]:
        """The cuts that keep copies, with their modules, and those modules' parameters; others let theirs go."""
        used = []
        for cut in self._cuts:
            found = cut.modules()
            if all(map(is_plain, found)) and not records_gradients(found):
                used.append((cut, found))
            else:
                cut.forget()
        modules = {id(m): m for _, found in used for m in found}.values()
        return used, [m._parameters for m in modules]

    def forget(self) -> None:
        """Let all copies go; the next prompt makes them anew."""
        for cut in self._cuts:
            cut.forget()
        self._state, self._print = None, []


def fingerprint(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Some elements of the parameters: one tensor of bytes a dtype and device (none of the meta device)."""
    samples: dict[tuple, list[torch.Tensor]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for parameter in parameters:
            if not parameter.is_meta:
                samples.setdefault((parameter.dtype, parameter.device), []).append(_sampled(parameter))
        return [torch.cat(pieces).view(torch.uint8) for pieces in samples.values()]


def _sampled(x: torch.Tensor) -> torch.Tensor:
    """Elements of x at regular steps, without a copy: all of a vector; of a matrix at least one of each row and column.

    Steps shorter than a row miss no row; no step and row have a common divisor, so the columns all come in turn.
    """
    if x.dim() != 2 or x.numel() < 2:
        return x.reshape(-1)
    step = _step(*x.shape)
    if x.is_contiguous():
        return x.as_strided((-(-x.numel() // step),), (step,))
    return x.reshape(-1)[::step]


@lru_cache(maxsize=256)
def _step(rows: int, columns: int) -> int:
    step = max(1, min(rows, columns - 1))
    while gcd(step, columns) > 1:
        step -= 1
    return step


def _equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.device == b.device and a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second)
    )


_home = attrgetter("dtype", "device")


def _state_of(parameter: torch.Tensor) -> tuple:
    version = -1 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, _home(parameter)
