"""The vision encoder of an unpatched model: where it is, and what its layers make of some samples under a plan.

The model's own code runs what stands before, between and behind the layers, up to the call of the text model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from ..executor.tower import Tower, TowerExecutor, TowerRun
from ..executor.tower_tables import TowerRows, TowerTables
from ..executor.transformers_internals import output_of
from ..kernels import Backend
from ..patches.family import bound
from ..patches.tower import TowerKind, blocks_of, find_tower, read_tower
from ..patches.tower_patch import last_read
from ..plans.layer_plan import LayerPlan
from ..plans.plan import VisualPlan
from .profiles import Target, arguments_of, hooked


@dataclass(frozen=True)
class Vision:
    """A model's vision encoder and where its parts are."""

    kind: TowerKind
    module: nn.Module
    tower: Tower

    @classmethod
    def of(cls, target: Target) -> Vision:
        """Raises PatchError if the model's family knows no such encoder."""
        kind, module = find_tower(target.family.towers, target.outer, "calibration")
        return cls(kind, module, read_tower(kind, module))

    @property
    def blocks(self) -> nn.ModuleList:
        return blocks_of(self.kind, self.module)

    @property
    def dense(self) -> VisualPlan:
        """The plan of the encoder's layers under which they compute everything."""
        return VisualPlan.dense(len(self.tower.layers)).replace(name="tower", about="")

    def rows(self, arguments: dict) -> TowerRows:
        """Where the rows of a call of the encoder lie."""
        return self.kind.rows(self.module, arguments)

    @contextmanager
    def calls(self, begin: Callable[[dict], None]) -> Iterator[None]:
        """Within the block, `begin` is told the arguments of every call of the encoder, by name."""

        def told(module, args, kwargs):
            begin(bound(type(module).forward, module, args, kwargs))

        handle = self.module.register_forward_pre_hook(told, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def tower_column_norms(vision: Vision) -> torch.Tensor:
    """(layers, neurons) norms of what the neurons of the FFNs add, float64 on the CPU."""
    norms = []
    for layer in vision.tower.layers:
        weight, scale = layer.module("down").weight.detach().double(), layer.scale_of(1)
        norms.append((weight if scale is None else weight * scale.detach()[:, None]).norm(dim=0).cpu())
    return torch.stack(norms)


def mean_by_layer(seen: list[torch.Tensor], layers: int) -> torch.Tensor:
    """(layers, neurons) float64 on the CPU of what `seen_neurons` saw, the mean over the encoder's calls."""
    return torch.stack(seen).double().cpu().unflatten(0, (-1, layers)).mean(0)


@contextmanager
def seen_neurons(vision: Vision) -> Iterator[list[torch.Tensor]]:
    """Within the block, (neurons,) mean |activation| on patches, of every layer in turn, once a call of the encoder."""
    found, rows = [], []

    def begin(arguments: dict) -> None:
        rows[:] = [torch.from_numpy(vision.rows(arguments).y >= 0)]

    def inner(module, args) -> None:
        values = args[0].reshape(-1, args[0].shape[-1])
        found.append(values[rows[0].to(values.device)].abs().float().mean(0))

    with vision.calls(begin), hooked([(layer.module("down"), inner) for layer in vision.tower.layers]):
        yield found


@contextmanager
def forwards(replaced: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Within the block, each function is the forward of its module."""
    with ExitStack() as stack:
        for module, function in replaced:
            before = vars(module).get("forward")
            stack.callback(setattr if before is not None else _removed, module, "forward", before)
            module.forward = function
        yield


def _removed(module: nn.Module, name: str, _) -> None:
    delattr(module, name)


@dataclass
class _Call:
    """One call of the encoder. last: the last layer that somebody reads. tables, states: of the rows that come into
    each layer; states also what comes out of the last. rotary: cos and sin of the rows, None without."""

    last: int
    grids: list[tuple[int, int]]
    tables: list[TowerTables]
    states: list[torch.Tensor]
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None


class VisionStates:
    """What comes into every layer of the encoder under the current plan (dense at first), for one batch of samples.

    inputs: of the outer model. Memory: those states and the inputs.
    """

    def __init__(self, vision: Vision, target: Target, inputs: dict, backend: Backend):
        self._vision, self._target, self._inputs, self._backend = vision, target, arguments_of(inputs), backend
        self._calls: list[_Call] = []
        self.adopt(vision.dense, 0)

    @property
    def last(self) -> int:
        """The last layer that somebody reads."""
        return max(call.last for call in self._calls)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(height, width) in patches of every image or frame that the encoder sees."""
        return [grid for call in self._calls for grid in call.grids]

    def layer_call(self, plan: VisualPlan, index: int) -> Callable[[], object]:
        """One run of layer `index` under a plan of the encoder's layers, in its first call. Where patches left before,
        evenly spaced ones stand for those that are chosen by what they hold."""
        call = self._calls[0]
        tables = call.tables[0]
        for before, layer in enumerate(plan.layers[:index]):
            if layer.tokens is not None:
                by = "uniform" if layer.tokens.by == "norm" else layer.tokens.by
                tables = tables.keep(replace(layer.tokens, by=by), before, None)
        alone = [LayerPlan.off()] * plan.num_layers
        alone[index] = replace(plan.layers[index], tokens=None)
        executor = TowerExecutor(self._vision.tower, plan.replace(layers=tuple(alone)), self._backend)
        executor.kept_cuts.refresh()
        run = TowerRun(executor, tables, index)
        return lambda: run.layer(index, call.states[0], call.rotary)

    def text_inputs(self, plan: VisualPlan, start: int) -> dict:
        """What the text model is called with, by name, under a plan that agrees with the current one before layer
        `start`."""
        return self._run(plan, start)[0]

    def adopt(self, plan: VisualPlan, start: int) -> dict:
        """The same, and the plan is the current one from now on."""
        named, self._calls = self._run(plan, start)
        return named

    def _run(self, plan: VisualPlan, start: int) -> tuple[dict, list[_Call]]:
        # the layers before are not run, so their weights are not cut either
        plan = plan.replace(layers=(*(LayerPlan.off(),) * start, *plan.layers[start:]))
        executor = TowerExecutor(self._vision.tower, plan, self._backend)
        executor.kept_cuts.refresh()
        running = _Running(self._vision, executor, start, self._calls)
        seen: dict = {}

        def text_model(*args, **named):
            seen.update(named)
            return output_of(named["inputs_embeds"], None, None)

        blocks = [(block, partial(running.layer, index)) for index, block in enumerate(self._vision.blocks)]
        with forwards([(self._target.text_model, text_model), *blocks]), self._vision.calls(running.begin):
            self._target.outer(**self._inputs, use_cache=False)
        return seen, running.done


class _Running:
    """One pass over a batch: the encoder's calls, one after the other, layer by layer."""

    def __init__(self, vision: Vision, executor: TowerExecutor, start: int, before: Sequence[_Call]):
        self._vision, self._executor, self._start, self._before = vision, executor, start, before
        self._run: TowerRun
        self.done: list[_Call] = []

    def begin(self, arguments: dict) -> None:
        start, number = self._start, len(self.done)
        if number < len(self._before):
            before = self._before[number]
            call = replace(before, tables=before.tables[: start + 1], states=before.states[: start + 1])
        else:
            rows = self._vision.rows(arguments)
            device = next(self._vision.module.parameters()).device
            count = len(self._vision.tower.layers)
            call = _Call(last_read(count, arguments) - 1, _grids(rows), [TowerTables.of(rows, device)], [])
        self._run = TowerRun(self._executor, call.tables[-1], call.last)
        self.done.append(call)

    def layer(self, index: int, hidden_states: torch.Tensor, *args, **named) -> torch.Tensor:
        call = self.done[-1]
        if index < self._start:
            return call.states[index + 1]
        if not call.states:
            call.states.append(hidden_states)
        call.rotary = named.get("position_embeddings")
        hidden = self._run.layer(index, hidden_states, call.rotary)
        call.states.append(hidden)
        call.tables.append(self._run.tables)
        return hidden


def _grids(rows: TowerRows) -> list[tuple[int, int]]:
    images = (rows.sequence == image for image in np.unique(rows.sequence))
    return [(int(rows.y[own].max()) + 1, int(rows.x[own].max()) + 1) for own in images]
