"""The modules of decoder layers as functions of a call: looked up when something changed, only compared otherwise.

Modules may be replaced, wrapped, hooked or given other weights at any time, and lanes never call the layers around
them. So once a call everything that decides how a part is run is compared with what it was when it was bound; in the
call a part is one function. Comparisons run over all layers at once in C: lists, `map` and operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from operator import is_
from types import ModuleType

import torch
from torch import nn

from ..kernels import fused, fused_operations
from ..kernels.fused import HeadNorm, Slots
from .rows import add_rows
from .weights import CutLinear, by_linear, is_plain, listens, product, select

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
        self.fused = operations = _operations(modules["query"])
        self._norms = {
            part: (modules[part], layer.norms[part][1])
            for part in layer.norms
            if _computes_rms(modules[part], *layer.norms[part])
        }
        for part, module in modules.items():
            setattr(self, part, _function(module, layer.fused.get(part)))
        for part, (module, eps) in self._norms.items():
            setattr(self, part, _rms(module, eps, operations))
        heads = {"query_norm", "key_norm"} & modules.keys()
        epsilons = {vars(module)[eps] for part, (module, eps) in self._norms.items() if part in heads}
        self.turns_at_once = operations is not None and heads <= self._norms.keys() and len(epsilons) <= 1
        self.is_silu = _is_silu(modules.get("activation"))
        self.gates_at_once = operations is not None and self.is_silu
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

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The activation of gate, times up, where it `gates_at_once`."""
        return self.fused.silu_mul(gate, up)

    def turned(self, y: torch.Tensor, queries: int, keys: int, cos: torch.Tensor, sin: torch.Tensor):
        """Of y (rows, queries + keys + values, head_dim): queries, and keys beside values, normed and rotated, where it
        `turns_at_once`. cos, sin: (rows, 1, width)."""
        if not keys:
            query, norm = y[:, :queries], self._head_norm()
            weight, eps = (None, 0.0) if norm is None else (norm.query, norm.eps)
            return self.fused.rotate(query, cos.squeeze(1), sin.squeeze(1), weight, eps), y[:, queries:]
        kv = y.new_empty(len(y), 2, keys, y.shape[2])
        return self.turned_into(y, queries, keys, cos, sin, Slots(*kv.unbind(1))), kv

    def turned_into(self, y: torch.Tensor, queries: int, keys: int, cos, sin, slots: Slots, with_query: bool = True):
        """As `turned`, with keys and values written into a store. Returns the queries."""
        query, key, value = y[:, :queries], y[:, queries : queries + keys], y[:, queries + keys :]
        query = query if queries and with_query else None
        return self.fused.rotate_into(query, key, value, cos.squeeze(1), sin.squeeze(1), slots, self._head_norm())

    def _head_norm(self) -> HeadNorm | None:
        if "query_norm" not in self._norms:
            return None
        (query, eps), (key, _) = self._norms["query_norm"], self._norms["key_norm"]
        return HeadNorm(query._parameters["weight"], key._parameters["weight"], vars(query)[eps])


class Product:
    """A plain linear layer, or a cut of some: tensors() gives weight and bias as they are now."""

    def __init__(self, tensors: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]):
        self._tensors = tensors

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, *self._tensors())

    def add_to(self, x: torch.Tensor, start: int, h: torch.Tensor) -> torch.Tensor:
        """x, where nobody records it, with what is made of h added to its rows from `start` on."""
        weight, bias = self._tensors()
        size = h.size(0)
        if bias is None and x.dtype == weight.dtype and by_linear(size, weight):
            rows = x if size == x.size(0) else x[start : start + size]
            torch.addmm(rows, h, weight.t(), out=rows)
            return x
        return add_rows(x, start, product(h, weight, bias))

    def of_nothing(self, x: torch.Tensor, width: int) -> torch.Tensor | None:
        """What zeros of `width` give, one row like those of x: the bias."""
        return self._tensors()[1]


class Called:
    """What is no plain linear layer, called whole."""

    def __init__(self, call: Function):
        self._call = call

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x)

    def add_to(self, x: torch.Tensor, start: int, h: torch.Tensor) -> torch.Tensor:
        return add_rows(x, start, self._call(h))

    def of_nothing(self, x: torch.Tensor, width: int) -> torch.Tensor:
        return self._call(x.new_zeros(1, width))[0]


def _function(module, outputs: range | None) -> Function:
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


def _rms(module: nn.Module, eps: str, operations: ModuleType | None) -> Function:
    held, parameters = vars(module), module._parameters

    def call(x):
        weight = parameters["weight"]
        return torch.rms_norm(x, weight.shape, weight, held[eps])

    def at_once(x):
        weight = parameters["weight"]
        if x.dim() > 2 or x.dtype != weight.dtype or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return call(x)
        return operations.rms_norm(x, weight, held[eps])

    return call if operations is None else at_once


def _operations(module) -> ModuleType | None:
    """The kernels that do in one launch what lies around the products, where weights like a module's have any."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Module) else None
    found = None if weight is None else fused_operations(weight)
    return None if found is fused else found


def _is_silu(module) -> bool:
    if not isinstance(module, nn.Module) or listens(vars(module)):
        return module is nn.functional.silu
    return type(module).__name__ in ("SiLU", "SiLUActivation") and _is_plain_function(module)


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
        self._kinds, self._at = self._kinds_of_weights(), self._home()
        self._numbered = [
            (held, name)
            for kind, held in zip(self._types, self._held)
            for name in held
            if kind is not nn.Linear and type(held[name]) in (int, float, bool)
        ]
        self._numbers = self._numbers_now()

    @property
    def is_recordable(self) -> bool:
        return all(layer.is_recordable for layer in self.layers)

    def places(self) -> tuple[list, ...]:
        """Where and how weights lie: what a recording goes by, beside `holds`."""
        weights = [weight for held in self._parameters for weight in held.values() if weight is not None]
        kinds = [weight.dtype for weight in weights]
        return list(map(torch.Tensor.data_ptr, weights)), kinds, list(map(torch.Tensor.stride, weights))

    def holds(self) -> bool:
        """Whether every part is run now as it was when it was bound."""
        return (
            all(map(is_, map(dict.get, self._owners, self._names), self._found))
            and all(map(is_, map(type, self._modules), self._types))
            and list(map(bool, self._hooks)) == self._heard
            and self._with_own_functions() == self._replaced
            and self._kinds_of_weights() == self._kinds
            and self._home() == self._at
            and self._numbers_now() == self._numbers
        )

    def _with_own_functions(self) -> list[bool]:
        names = ("forward", "_hf_hook")
        return [found for name in names for found in map(dict.__contains__, self._held, repeat(name))]

    def _numbers_now(self) -> list:
        """What modules that are no linear layers compute with: epsilons."""
        return [held.get(name) for held, name in self._numbered]

    def _home(self) -> tuple | None:
        """Device and dtype, by which kernels are chosen."""
        weight = next((held.get("weight") for held in self._parameters if held.get("weight") is not None), None)
        return None if weight is None else (weight.device, weight.dtype)

    def _kinds_of_weights(self) -> list[type]:
        return list(map(type, map(dict.get, self._parameters, repeat("weight"))))
