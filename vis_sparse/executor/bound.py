"""The modules of decoder layers as functions of a call: looked up when something changed, only compared otherwise.

Modules may be replaced, wrapped, hooked or given other weights at any time, and lanes never call the layers around
them. So once a call everything that decides how a part is run is compared with what it was when it was bound; in the
call a part is one function. Comparisons run over all layers at once in C: lists, `map` and operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from operator import is_

import torch
from torch import nn

from .rows import add_rows
from .weights import CutLinear, is_plain, is_small, listens, product, select

Function = Callable[[torch.Tensor], torch.Tensor]
_LINEAR = ("query", "key", "value", "output", "gate", "up", "down")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BoundLayer:
    """One layer's parts, each a function of rows, under its name in `DecoderLayer.parts`, and its cuts.

    is_recordable: whether all that they do is what weights say, so that a recording may stand for them. linears: query,
    key and value where all three are plain (`weights.is_plain`): (their `_parameters`, their outputs of a fused layer
    or None); else None.
    """

    def __init__(self, layer, cuts: dict[str, CutLinear]):
        modules = {part: layer.module(part) for part in layer.parts}
        for part, module in modules.items():
            setattr(self, part, _function(module, layer.fused.get(part), layer.norms.get(part)))
        for name, cut in cuts.items():
            modules_of = cut.modules()
            plain = all(map(is_plain, modules_of))
            call = Product(cut.tensors(modules_of)) if plain else Called(cut.whole(modules_of))
            setattr(self, name, call)
        self.is_recordable = all(
            is_plain(module) or part not in _LINEAR and _is_plain_function(module) for part, module in modules.items()
        )
        names = ("query", "key", "value")
        whole = all(is_plain(modules[name]) for name in names)
        self.linears = [(modules[name]._parameters, layer.fused.get(name)) for name in names] if whole else None


class Product:
    """A plain linear layer, or a cut of some: tensors() gives weight and bias as they are now."""

    def __init__(self, tensors: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]):
        self._tensors = tensors

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, *self._tensors())

    def add_to(self, x: torch.Tensor, start: int, h: torch.Tensor) -> torch.Tensor:
        """x, where nobody records it, with what is made of h added to its rows from `start` on."""
        weight, bias = self._tensors()
        if bias is None and x.dtype == weight.dtype and is_small(len(h), weight):
            rows = x[start : start + len(h)]
            torch.addmm(rows, h, weight.t(), out=rows)
            return x
        return add_rows(x, start, product(h, weight, bias))


class Called:
    """What is no plain linear layer, called whole."""

    def __init__(self, call: Function):
        self._call = call

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x)

    def add_to(self, x: torch.Tensor, start: int, h: torch.Tensor) -> torch.Tensor:
        return add_rows(x, start, self._call(h))


def _function(module, outputs: range | None, norm: tuple[type, str] | None) -> Function:
    if norm is not None and _computes_rms(module, *norm):
        return _rms(module, norm[1])
    if is_plain(module):
        parameters = module._parameters
        return Product(lambda: own(parameters, outputs))
    return Called(module if outputs is None else lambda x: select(module(x), 1, outputs))


def own(parameters: dict, outputs: range | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a part of a linear layer, views for one of a fused layer's parts."""
    weight, bias = parameters["weight"], parameters["bias"]
    if outputs is None:
        return weight, bias
    place = slice(outputs.start, outputs.stop)
    return weight[place], None if bias is None else bias[place]


def _computes_rms(module: nn.Module, kind: type, eps: str) -> bool:
    held = vars(module)
    return type(module) is kind and eps in held and not listens(held)


def _rms(module: nn.Module, eps: str) -> Function:
    held, parameters = vars(module), module._parameters

    def call(x):
        weight = parameters["weight"]
        return torch.rms_norm(x, weight.shape, weight, held[eps])

    return call


def _is_plain_function(module) -> bool:
    """A norm or an activation that is a function of its input, its own weights and numbers, and nothing else."""
    if not isinstance(module, nn.Module) or listens(vars(module)) or module._buffers or module._modules:
        return False
    return type(module).__module__.startswith(("torch.nn.", "transformers."))


class Bound:
    """Layers as they were bound, and whether that still holds. checked: what callers found right while it did."""

    def __init__(self, layers: Iterable[tuple[object, dict[str, CutLinear]]]):
        layers = list(layers)
        self.layers = [BoundLayer(layer, cuts) for layer, cuts in layers]
        places = [place for layer, _ in layers for place in layer.parts.values()]
        # functions that are no modules lie elsewhere
        self._owners = [owner._modules if name in owner._modules else vars(owner) for owner, name in places]
        self.checked: object = None
        self._names = [name for _, name in places]
        self._found = list(map(dict.get, self._owners, self._names))
        modules = [module for module in self._found if isinstance(module, nn.Module)]
        self._modules, self._types = modules, list(map(type, modules))
        self._held = list(map(vars, modules))
        self._hooks = [held[name] for held in self._held for name in _HOOKS]
        self._heard = list(map(bool, self._hooks))
        self._replaced = self._with_own_functions()
        self._parameters = [held["_parameters"] for held in self._held]
        self._kinds = self._kinds_of_weights()
        numbers = [(held, name) for held in self._held for name in held if type(held[name]) in (int, float, bool)]
        self._numbers = [held for held, _ in numbers], [name for _, name in numbers]

    @property
    def is_recordable(self) -> bool:
        return all(layer.is_recordable for layer in self.layers)

    def places(self) -> tuple[list, ...]:
        """Where and how weights lie, and the modules' numbers (epsilons): what a recording goes by, beside `holds`."""
        weights = [weight for held in self._parameters for weight in held.values() if weight is not None]
        kinds = [weight.dtype for weight in weights]
        strides, numbers = list(map(torch.Tensor.stride, weights)), list(map(dict.get, *self._numbers))
        return list(map(torch.Tensor.data_ptr, weights)), kinds, strides, numbers

    def holds(self) -> bool:
        """Whether every part is run now as it was when it was bound."""
        return (
            all(map(is_, map(dict.get, self._owners, self._names), self._found))
            and all(map(is_, map(type, self._modules), self._types))
            and list(map(bool, self._hooks)) == self._heard
            and self._with_own_functions() == self._replaced
            and self._kinds_of_weights() == self._kinds
        )

    def _with_own_functions(self) -> list[bool]:
        names = ("forward", "_hf_hook")
        return [found for name in names for found in map(dict.__contains__, self._held, repeat(name))]

    def _kinds_of_weights(self) -> list[type]:
        return list(map(type, map(dict.get, self._parameters, repeat("weight"))))
