"""What stands in a vision encoder's places while the model is patched under a plan with a tower section."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import torch
from torch import nn

from ..executor.before_scores import distinct, token_patches
from ..executor.kept_calls import KeptCalls
from ..executor.token_scores import on_host
from ..executor.tower import Tower, TowerExecutor, TowerRun
from ..executor.tower_tables import TowerRows, TowerTables
from ..kernels import Backend
from ..plans.plan import VisualPlan
from .arguments import unbound
from .before import say
from .errors import PatchError
from .family import bound
from .scopes import held
from .tower import TowerKind, blocks_of

# The call of an encoder that runs in this context, and the layers' part in it; None: under a plan without a tower.
_RUN: ContextVar[tuple[PatchedTower, TowerRun | None] | None] = ContextVar("vis_sparse_tower", default=None)
# What an encoder gives beside hidden states, all of it made of the last layer's.
_OF_THE_LAST = ("last_hidden_state", "pooler_output")


def needs_tower(plan: VisualPlan) -> bool:
    """Whether the encoder runs under a plan: for a section of its own, or to say which tokens come in."""
    return plan.tower is not None or plan.before is not None and plan.before.needs_tower


class PatchedTower:
    """An encoder with an executor for each plan that needs it, its tower section, if it has one, resolved.

    merge: patches on a side of a token.
    """

    def __init__(
        self,
        kind: TowerKind,
        module: nn.Module,
        tower: Tower,
        plans: Mapping[str, VisualPlan],
        backend: Backend,
        merge: int,
    ):
        self.kind, self.module, self.tower, self._merge = kind, module, tower, merge
        whole = VisualPlan.dense(len(tower.layers))
        needing = {name: plan for name, plan in plans.items() if needs_tower(plan)}
        self.executors = {name: TowerExecutor(tower, plan.tower or whole, backend) for name, plan in needing.items()}
        self._before = {name: plan.before for name, plan in needing.items()}
        self._blocks = list(blocks_of(kind, module))
        self.kept_calls = KeptCalls()

    @property
    def sizes(self) -> tuple[int, int]:
        """Heads and neurons of a layer."""
        return self.tower.num_heads, self.tower.ffn_size

    @property
    def extra_bytes(self) -> int:
        return sum(executor.kept_cuts.bytes for executor in self.executors.values())

    def replaced(self) -> Iterator[tuple[nn.Module, str, object]]:
        """Modules, names and what stands there while the model is patched."""
        yield self.module, "forward", _tower_forward
        yield self.module, "_apply", _apply
        for index, block in enumerate(self._blocks):
            yield block, "forward", functools.partial(_block_forward, index)

    def run(self, name: str, arguments: dict) -> TowerRun | None:
        """The layers' part in a call under a plan; None if the plan does not need the encoder.

        Duplicates leave here, and are said to.
        """
        executor = self.executors.get(name)
        if executor is None:
            return None
        config = self.module.config
        attentions = arguments.get("output_attentions")
        if getattr(config, "output_attentions", False) if attentions is None else attentions:
            raise PatchError(
                "output_attentions: got True of a vision tower under a plan, expected False (no attention matrix is "
                "formed; unpatch the model to get them)"
            )
        if torch.is_grad_enabled() and any(lane.layer.checkpoints for lane in executor.running):
            raise PatchError(
                "vision tower: got gradient checkpointing under a plan's tower section, expected none in the tower "
                "(gradient_checkpointing_disable, or freeze it and call it without gradients)"
            )
        now = list(blocks_of(self.kind, self.module))
        if len(now) != len(self._blocks) or any(a is not b for a, b in zip(now, self._blocks)):
            raise PatchError("vision tower: got other layers than at vis_sparse.patch, expected the same (patch again)")
        executor.kept_cuts.refresh()
        rows = self.kind.rows(self.module, arguments)
        device = next(self._blocks[0].parameters()).device
        key = (device, *(None if each is None else each.tobytes() for each in rows))
        tables = self.kept_calls.get(key)
        if tables is None:
            tables = TowerTables.of(rows, device)
            self.kept_calls.keep(key, tables)
        before = self._before[name]
        if before is not None and before.by == "duplicate":
            tables = self._without_duplicates(before.tolerance, rows, tables, arguments)
        scored = before is not None and before.by == "received"
        return TowerRun(executor, tables, last_read(len(self._blocks), arguments) - 1, scored)

    def _without_duplicates(self, tolerance: float, rows: TowerRows, tables: TowerTables, arguments: dict):
        patches = token_patches(rows, self._merge)
        pixels = self.kind.pixels(self.module, arguments, self._merge)
        stays = distinct(pixels.detach(), rows, patches, self._merge, tolerance)
        say(stays.astype(float))
        return tables if stays.all() else tables.only(patches[stays].ravel())

    def say_received(self, run: TowerRun, arguments: dict) -> None:
        """The attention that tokens received in a call, the mean over their patches, is said."""
        if run.received is None:
            raise PatchError(
                "before: got a vision tower of which no layer runs, expected one (by received, its last one decides)"
            )
        patches = token_patches(self.kind.rows(self.module, arguments), self._merge)
        say(on_host(run.received)[patches].mean(1))


def last_read(num_layers: int, arguments: dict) -> int:
    """The last hidden state that somebody reads of an encoder's call, counted from 0 for the first layer's input.

    transformers asks an encoder for the hidden states that a model's feature layers are, by index; nobody reads the
    others, or what is made of the last one.
    """
    chosen = arguments.get("output_hidden_states")
    if chosen is None or isinstance(chosen, bool) or arguments.get("return_dict") is False:
        return num_layers
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    return max((index % (num_layers + 1) for index in chosen), default=num_layers)


@torch.compiler.disable
def _tower_forward(state, plain, *args, **kwargs):
    """The encoder's forward, within which its layers know where their rows lie."""
    tower: PatchedTower = state.tower
    args = unbound(tower.module, args)
    arguments = bound(type(tower.module).forward, tower.module, args, kwargs)
    run = tower.run(_plan_of_call(state), arguments)
    token = _RUN.set((tower, run))
    try:
        output = plain(*args, **kwargs)
    finally:
        _RUN.reset(token)
    if run is not None and run.is_scored:
        tower.say_received(run, arguments)
    if run is None or last_read(len(tower._blocks), arguments) == len(tower._blocks):
        return output
    # what would be made of a layer that did not run is empty, not stale
    missing = {name: output[name].new_empty(0) for name in _OF_THE_LAST if output.get(name) is not None}
    return type(output)(**{**output, **missing})


def _plan_of_call(state) -> str:
    """The plan of the model's call that runs, of the block around it, or the default."""
    running = state.running
    if running is not None and running.plan is not None:
        return running.plan
    asked = held(state.text_model, "plan")
    return state.default if asked is None else asked


def _block_forward(index: int, state, plain, *args, **kwargs):
    """A layer's forward: its part in the encoder's call."""
    current = _RUN.get()
    if current is None or current[0] is not state.tower:
        raise PatchError(
            f"vision tower: got a call of layer {index} alone, expected calls of the whole encoder while the model is "
            "patched under a plan with a tower section"
        )
    run = current[1]
    args = unbound(state.tower._blocks[index], args)
    if run is None:
        return plain(*args, **kwargs)
    hidden = args[0] if args else kwargs["hidden_states"]
    return run.layer(index, hidden, kwargs.get("position_embeddings"))


def _apply(state, plain, *args, **kwargs):
    """`to`, `half`, `cuda`, ... of the encoder: copies of the old weights go at once."""
    try:
        return plain(*args, **kwargs)
    finally:
        for executor in state.tower.executors.values():
            executor.kept_cuts.forget()
