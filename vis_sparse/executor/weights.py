"""Linear layers cut to the heads and neurons that visual rows use, and the matrix product that runs them.

A cut of a plain `nn.Linear` is a view where its rows or columns follow one another, a contiguous copy otherwise
(its bytes are reported by `vis_sparse.inspect`). The parameters themselves are never touched: `state_dict`,
`save_pretrained`, optimizers and `unpatch` see the original tensors. Everything that is not a plain linear layer on
a real device (LoRA, quantised, offloaded, sharded) is called whole and its output is cut: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

# `weight @ x.T` beats `x @ weight.T` in MKL while there are few rows (it blocks over the long side of the result):
# 1.1 to 1.2 times at 64 rows, 1.07 at 576, width 4096. At 1 to 8 rows the two are equal.
_MIN_ROWS = 16
_ONE_DNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` for x (rows, in) and weight (out, in), by the routine that is fastest on the device.

    On a CPU in fp32 that is oneDNN's where it may be used (1 to 3.5 times as fast as `linear`, most at 4 to 16 rows),
    and else the better order of the operands. The result (rows, out) may be laid out column by column.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if _suits_one_dnn(x, weight):
        return _ONE_DNN(x, weight, bias, "none", [], "")
    if x.shape[0] < _MIN_ROWS:
        return F.linear(x, weight, bias)
    out = torch.mm(weight, x.t()).t()
    return out if bias is None else out + bias


def _suits_one_dnn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN's operation gives what `linear` gives: it knows neither gradients nor autocast, and crawls over
    weights that are not contiguous."""
    return (
        _ONE_DNN is not None
        and torch.backends.mkldnn.enabled
        and x.shape[0] > 0
        and x.is_contiguous()
        and weight.is_contiguous()
        and weight.dtype == torch.float32
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


if _ONE_DNN is not None:

    @register_flop_formula(_ONE_DNN)
    def _one_dnn_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * prod(x_shape) * weight_shape[0]


def is_plain(module: nn.Module) -> bool:
    """Whether the weight may be used directly instead of calling the module."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not hasattr(module, "_hf_hook")
        and "forward" not in vars(module)
    )


def apply(module: nn.Module, x: torch.Tensor, outputs: range | None = None) -> torch.Tensor:
    """The linear layer on x (rows, in). outputs: of a fused projection, those that are wanted; None: all."""
    if outputs is None:
        return product(x, module.weight, module.bias) if is_plain(module) else module(x)
    if not is_plain(module):
        return select(module(x), 1, outputs)
    bias = None if module.bias is None else select(module.bias, 0, outputs)
    return product(x, select(module.weight, 0, outputs), bias)


def select(x: torch.Tensor, dim: int, indices: Sequence[int]) -> torch.Tensor:
    """x at `indices` along `dim`: x itself if they are all of it, a view if they follow one another, else a copy."""
    first = indices[0] if len(indices) else 0
    if list(indices) == list(range(first, first + len(indices))):
        return x if len(indices) == x.shape[dim] else x.narrow(dim, first, len(indices))
    return x.index_select(dim, index_on(tuple(indices), x.device))


@lru_cache(maxsize=4096)
def index_on(indices: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Indices on a device, kept: every layer of every call asks for the same few."""
    with torch.inference_mode(False):
        return torch.tensor(indices, device=device)


def unit_columns(units: Sequence[int], width: int) -> tuple[int, ...]:
    """Indices of the columns of `units` (heads) that are `width` (head_dim) columns each."""
    return tuple(unit * width + offset for unit in units for offset in range(width))


class CutLinear:
    """Linear layers side by side, cut to some outputs (`rows`, a list for each layer) or inputs (`columns`).

    find(name) gives a layer's module; it is asked in every call, since adapters may replace modules. Called with
    x (n, in) it gives (n, sum of the layers' outputs); with `columns`, x holds those inputs only.
    The cut weight is kept until a parameter changes (optimizer step, loading, moving), and is cut anew in every call
    while gradients are recorded, so that they reach the parameters. A compiled call cannot look for changes: `refresh`
    does it before.
    """

    def __init__(
        self,
        find: Callable[[str], nn.Module],
        names: Sequence[str],
        rows: Sequence[Sequence[int]] | None = None,
        columns: Sequence[int] | None = None,
    ):
        self._find, self._names, self._rows, self._columns = find, tuple(names), rows, columns
        self._key = None
        self._weight = self._bias = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        modules = [self._find(name) for name in self._names]
        if not all(map(is_plain, modules)):
            return self._whole(x, modules)
        if torch.is_grad_enabled() and any(m.weight.requires_grad for m in modules):
            return product(x, *self._cut(modules))
        if not torch.compiler.is_compiling():
            self._keep(modules)
        return product(x, self._weight, self._bias)

    @torch.compiler.disable
    def refresh(self) -> None:
        """Bring the kept cut up to date with the parameters."""
        modules = [self._find(name) for name in self._names]
        if modules and all(map(is_plain, modules)):
            self._keep(modules)

    def _keep(self, modules) -> None:
        key = tuple(_state(p) for m in modules for p in (m.weight, m.bias) if p is not None)
        if key != self._key:
            # a tensor made in inference mode could not serve a later call that records gradients
            with torch.inference_mode(False), torch.no_grad():
                self._weight, self._bias = self._cut(modules)
            self._key = key

    @property
    def extra_bytes(self) -> int:
        """Bytes of the kept copy; 0 if the cut is a view or has not been made."""
        if self._weight is None:
            return 0
        pieces = [t for t in (self._weight, self._bias) if t is not None]
        parameters = [p for name in self._names for p in self._find(name).parameters()]
        owned = {p.untyped_storage().data_ptr() for p in parameters}
        return sum(t.numel() * t.element_size() for t in pieces if t.untyped_storage().data_ptr() not in owned)

    def _cut(self, modules):
        if self._columns is not None:
            (module,) = modules
            return select(module.weight, 1, self._columns), module.bias
        weights = [select(m.weight, 0, rows) for m, rows in zip(modules, self._rows)]
        biases = [m.bias for m in modules]
        if all(bias is None for bias in biases):
            bias = None
        else:
            filled = [m.weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in modules]
            bias = _join([select(b, 0, rows) for b, rows in zip(filled, self._rows)])
        return _join(weights), bias

    def _whole(self, x, modules):
        if self._columns is not None:
            (module,) = modules
            full = x.new_zeros(x.shape[0], module.in_features)
            columns = torch.tensor(self._columns, device=x.device)
            return module(full.index_copy(1, columns, x))
        return _join([select(m(x), 1, rows) for m, rows in zip(modules, self._rows)], dim=1)


def _join(pieces: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _state(parameter: torch.Tensor) -> tuple:
    version = -1 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device
