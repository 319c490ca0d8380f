"""Functions of tensors recorded once and run again without Python: a CUDA graph on a GPU, a compiled graph elsewhere.

A recording is bound to the tensors that the function found around it (weights, stores, tables): it reads and writes
them where they lay when it was recorded. Whoever keeps it sees to it that they still lie there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .weights import RECORDS, autocasts

_LOCK = threading.Lock()  # neither compilers nor captures like company
_WARM_UPS = 2


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Recording:
    """`function`, run for `inputs`, to be run again for others of their shapes, dtypes and device.

    The function is run meanwhile, more than once on a GPU: what it writes around it has to be set right afterwards.
    """
    kind = CudaRecording if inputs[0].is_cuda else Recording
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        return kind(function, inputs)


def bucket(number: int, smallest: int = 16) -> int:
    """The number or a little more (at most a quarter): few different ones, multiples of an eighth of a power of two."""
    step = max(smallest, 2 ** ((number - 1).bit_length() - 3)) if number > 1 else smallest
    return -(-number // step) * step


def may_replay(device: torch.device) -> bool:
    """Whether a call made here may be one that was recorded: nobody records gradients, traces, counts or casts it."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or device.type == "meta"
        or autocasts(device)
    )


class Recording:
    """A compiled graph of a function. Called with inputs, which it copies; gives tensors that are the caller's own."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]):
        self._inputs = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in inputs]
        torch._foreach_copy_(self._inputs, list(inputs))
        self._busy = threading.Lock()
        self._prepare(function)

    def _prepare(self, function: Callable[..., Sequence[Tensor]]) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx  # a second of imports

        token = RECORDS.set(True)
        try:
            graph = make_fx(lambda *inputs: function(*inputs))(*self._inputs)
        finally:
            RECORDS.reset(token)
        self._graph = compiled(graph)

    @property
    def bytes(self) -> int:
        """Of what it holds on to."""
        return sum(each.nbytes for each in self._inputs)

    def wait(self) -> None:
        """Before what the recording reads and writes is changed: until its last run is over, as far as that is asked
        of a device."""

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with self._busy, torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(self._inputs, list(inputs))
            return list(self._graph(*self._inputs))


def compiled(graph: torch.fx.GraphModule) -> Callable[..., Sequence[Tensor]]:
    return torch.compile(graph, fullgraph=True, dynamic=False)


class CudaRecording(Recording):
    """A CUDA graph of a function."""

    def _prepare(self, function: Callable[..., Sequence[Tensor]]) -> None:
        device = self._inputs[0].device
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):  # what is made at the first use: kernels, workspaces, tables
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
            # other threads may allocate meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = list(function(*self._inputs))

    @property
    def bytes(self) -> int:
        return super().bytes + sum(each.nbytes for each in self._outputs)

    def wait(self) -> None:
        # another thread may have run it, on a stream of its own
        torch.cuda.current_stream(self._inputs[0].device).wait_event(self._done)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        device = self._inputs[0].device
        with self._busy, torch.cuda.device(device):
            self.wait()
            torch._foreach_copy_(self._inputs, list(inputs))
            self._graph.replay()
            outputs = [each.clone() for each in self._outputs]
            self._done.record()
        return outputs
