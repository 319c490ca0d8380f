"""Linear layers cut to the heads and neurons that visual rows use, and the matrix product that runs them.

A cut of a plain `nn.Linear` is a view where its rows or columns follow one another, a contiguous copy otherwise
(its bytes are reported by `vis_sparse.inspect`). The parameters themselves are never touched: `state_dict`,
`save_pretrained`, optimizers and `unpatch` see the original tensors. Everything that is not a plain linear layer on
a real device (LoRA, quantised, offloaded) is called whole and its output is cut: slower, never wrong.
Whether a kept copy is still what the parameters say is decided in `kept_cuts.py`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import lru_cache
from itertools import islice
from math import inf, prod

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


def _is_intel() -> bool:
    """Whether the processor is Intel's: MKL, which is `linear` on x86, has routines that only those get."""
    try:
        with open("/proc/cpuinfo") as lines:
            return any("GenuineIntel" in line for line in islice(lines, 8))
    except OSError:
        return "Intel" in platform.processor()


# Multiply-adds from which oneDNN's product is ahead of `linear` (it costs 10 us or more whatever it multiplies), the
# least weights and the most rows: on its maker's processors MKL is ahead with less and with more. docs/speed.md has the
# measurements; `python -m vis_sparse.eval.bench_products` makes them.
_ONE_DNN_FROM, _ONE_DNN_WEIGHTS, _ONE_DNN_ROWS = (2**23, 2**20, 128) if _is_intel() else (2**20, 0, inf)
_MIN_ROWS = 16  # of products that oneDNN may not run, from which the operands' order counts
# Whether this context traces what a compiler gets, which takes oneDNN's operation for constant weights alone.
RECORDS: ContextVar[bool] = ContextVar("vis_sparse_records", default=False)
_ONE_DNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` for x (rows, in) and weight (out, in), by the routine that is fastest on the device.

    On a CPU in fp32 that is oneDNN's for large products of not too many rows (`by_linear`), where it may be used; where
    it may not, `weight @ x.T` beats `x @ weight.T` in MKL while there are few rows (it blocks over the long side of the
    result: 1.1 to 1.2 times at 64 rows, 1.07 at 576, width 4096), and the result (rows, out) is laid out column by
    column.
    """
    rows = x.shape[0]
    if by_linear(rows, weight) or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if _suits_one_dnn(x, weight):
        return _ONE_DNN(x, weight, bias, "none", [], "")
    if rows < _MIN_ROWS:
        return F.linear(x, weight, bias)
    out = torch.mm(weight, x.t()).t()
    return out if bias is None else out + bias


def by_linear(rows: int, weight: torch.Tensor) -> bool:
    """Whether a product is `linear`'s, by its size and by where it runs."""
    return (
        rows * weight.numel() < _ONE_DNN_FROM
        or weight.numel() < _ONE_DNN_WEIGHTS
        or rows > _ONE_DNN_ROWS
        or weight.device.type != "cpu"
        or weight.dtype != torch.float32
    )


def _suits_one_dnn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN's operation gives what `linear` gives: it knows neither gradients nor autocast, and crawls over
    weights that are not contiguous."""
    return (
        _ONE_DNN is not None
        and torch.backends.mkldnn.enabled
        and x.is_contiguous()
        and weight.is_contiguous()
        and weight.dtype == torch.float32
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not RECORDS.get()
    )


if _ONE_DNN is not None:

    @register_flop_formula(_ONE_DNN)
    def _one_dnn_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * prod(x_shape) * weight_shape[0]


def autocasts(device: torch.device) -> bool:
    """Whether products on a device run under autocast, which the meta device does not know."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def is_plain(module: nn.Module) -> bool:
    """Whether the weight may be used directly instead of calling the module: nobody listens to its calls.

    Hooks on all modules at once, which counters and profilers set, are not asked: they would change what they count.
    """
    held = vars(module)  # attributes of modules are slow
    return type(module) is nn.Linear and type(held["_parameters"].get("weight")) is nn.Parameter and not listens(held)


def listens(held: dict) -> bool:
    """Whether somebody listens to a module's calls, or has replaced them; `held`: its attributes."""
    return bool(
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "_hf_hook" in held
        or "forward" in held
    )


def tensors(module: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a plain linear layer."""
    parameters = module._parameters
    return parameters["weight"], parameters["bias"]


def follow(indices: Sequence[int]) -> bool:
    """Whether the indices follow one another: what they select is a view."""
    first = indices[0] if len(indices) else 0
    return list(indices) == list(range(first, first + len(indices)))


class Selection:
    """Indices of a dimension (of `size`, if they may be all), sorted out once. Called with a tensor and the dimension
    it gives the tensor itself if they are all of it, a view if they follow one another, else a copy."""

    def __init__(self, indices: Sequence[int], size: int | None = None):
        self.indices, self._size = tuple(indices), len(indices)
        self._first = (self.indices[0] if self.indices else 0) if follow(indices) else None
        self.is_whole = self._first is not None and self._size == size
        self._on: dict[torch.device, torch.Tensor] = {}

    @property
    def is_view(self) -> bool:
        return self._first is not None

    def __len__(self) -> int:
        return self._size

    def __call__(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        if self.is_whole:
            return x
        if self._first is None:
            return x.index_select(dim, self.on(x.device))
        return x.narrow(dim, self._first, self._size)

    def on(self, device: torch.device) -> torch.Tensor:
        """The indices on a device. They stay as long as the selection: recordings read them."""
        if torch.compiler.is_compiling():
            return index_on(self.indices, device)
        if device not in self._on:
            self._on[device] = index_on(self.indices, device)
        return self._on[device]


def select(x: torch.Tensor, dim: int, indices: Sequence[int]) -> torch.Tensor:
    """x at `indices` along `dim`, for once (`Selection`)."""
    if not follow(indices):
        return x.index_select(dim, index_on(tuple(indices), x.device))
    return x if len(indices) == x.shape[dim] else x.narrow(dim, indices[0] if len(indices) else 0, len(indices))


@lru_cache(maxsize=4096)
def index_on(indices: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Indices on a device, kept: every layer of every call asks for the same few."""
    with torch.inference_mode(False):
        return torch.tensor(indices, device=device)


def unit_columns(units: Sequence[int], width: int) -> tuple[int, ...]:
    """Indices of the columns of `units` (heads) that are `width` (head_dim) columns each."""
    return tuple(unit * width + offset for unit in units for offset in range(width))


class CutLinear:
    """Linear layers side by side, cut to some outputs (`rows`, a list for each layer) or inputs (`columns` of `width`).

    find(name) gives a layer's module, which adapters may replace. The cut takes x (n, in) to (n, sum of the layers'
    outputs); with `columns`, x holds those inputs only.
    A view is made in every call: kept, it would hold on to the storage that a parameter had once. A copy is kept by
    `keep` and used until `forget`; without one the weight is cut in every call, as it is while gradients are recorded
    for it, so that they reach the parameters.
    """

    def __init__(
        self,
        find: Callable[[str], nn.Module],
        names: Sequence[str],
        rows: Sequence[Sequence[int]] | None = None,
        columns: Sequence[int] | None = None,
        width: int = 0,
    ):
        self._find, self._names, self.width = find, tuple(names), width
        self._rows = None if rows is None else [Selection(each) for each in rows]
        self._columns = None if columns is None else Selection(columns)
        self._kept: tuple[torch.Tensor, torch.Tensor | None] | None = None
        pieces = [self._columns] if rows is None else self._rows
        self.copies = bool(names) and any(map(len, pieces)) and (len(names) > 1 or not pieces[0].is_view)

    def __getstate__(self):
        return {**vars(self), "_kept": None}  # a copy of the model makes its own

    @property
    def dim(self) -> int:
        return 0 if self._columns is None else 1

    @property
    def selection(self) -> Selection:
        """What the cut of the first layer keeps, along `dim`."""
        return self._rows[0] if self._columns is None else self._columns

    def modules(self) -> list[nn.Module]:
        return [self._find(name) for name in self._names]

    def tensors(self, modules: Sequence[nn.Module]) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """What gives the cut weight and bias of plain `modules` as they are now."""

        if len(modules) == 1 and not self.copies:
            return lambda: self._view(*tensors(modules[0]))

        def found():
            kept = self._kept
            return self._cut(modules) if kept is None or records_gradients(modules) else kept

        return found

    def whole(self, modules: Sequence[nn.Module]) -> Callable[[torch.Tensor], torch.Tensor]:
        """What calls any `modules` whole and cuts what they give."""
        return lambda x: self._whole(x, modules)

    def keep(self, modules: Sequence[nn.Module]) -> None:
        """Cut the weights of plain `modules` and keep the copy."""
        # a tensor made in inference mode could not serve a later call that records gradients
        with torch.inference_mode(False), torch.no_grad():
            self._kept = self._cut(modules)

    def forget(self) -> None:
        self._kept = None

    @property
    def kept(self) -> tuple[torch.Tensor | None, ...]:
        """The kept copy of weight and bias, if there is one."""
        return self._kept or ()

    @property
    def extra_bytes(self) -> int:
        """Bytes of the kept copy."""
        return sum(t.numel() * t.element_size() for t in self.kept if t is not None)

    def _view(self, weight, bias):
        if self._columns is not None:
            return self._columns(weight, 1), bias
        (rows,) = self._rows
        return rows(weight, 0), None if bias is None else rows(bias, 0)

    def _cut(self, modules):
        if self._columns is not None:
            (module,) = modules
            return self._view(*tensors(module))
        weights, biases = zip(*map(tensors, modules))
        if all(bias is None for bias in biases):
            bias = None
        else:
            filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases)]
            bias = _join([rows(b, 0) for b, rows in zip(filled, self._rows)])
        return _join([rows(w, 0) for w, rows in zip(weights, self._rows)]), bias

    def _whole(self, x, modules):
        if self._columns is not None:
            (module,) = modules
            full = x.new_zeros(x.shape[0], self.width)
            return module(full.index_copy(1, index_on(self._columns.indices, x.device), x))
        return _join([rows(m(x), 1) for m, rows in zip(modules, self._rows)], dim=1)


def records_gradients(modules: Sequence[nn.Module]) -> bool:
    """Whether gradients are recorded for a weight or bias of these layers."""
    return torch.is_grad_enabled() and any(p.requires_grad for m in modules for p in m.parameters(recurse=False))


def _join(pieces: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
