"""The forward of a vLLM model under plans: rows that a layer does not compute never enter it.

Three ways, by what the step holds. No visual row (all decode steps): the engine's own forward, compiled as it is.
Visual rows that no layer changes: their keys are written first, then the engine's own text model runs on the text rows.
Else: a loop over the engine's own layers, each on the rows that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn

from .backends import planned_backend, update_with_copies
from .cuts import Shards, VisualFFN, VisualKeys
from .kinds import READ, TEXT, LayerKinds
from .runtime import Runtime
from .step import Step


def planned_forward(
    model: nn.Module, runtime: Runtime, shards: Shards, pack: Callable | None, get_context: Callable
) -> PlannedForward:
    """The forward of `model` under the runtime's plans, after its layers were made ready for it.

    Cuts the weights that visual rows need, and gives layers that leave rows out their backend and their write of keys.
    pack: what the engine does to weights of products, if anything. get_context: gives the engine's context of a call.
    """
    keys, ffns, updates = {}, {}, {}
    for index, (kinds, layer) in enumerate(zip(runtime.layers, model.language_model.model.layers)):
        attention = layer.self_attn.attn
        updates[index] = attention.impl.do_kv_cache_update
        if READ in kinds.attention:
            keys[index] = VisualKeys(layer.self_attn, pack)
        if TEXT in kinds.attention:
            attention.impl.do_kv_cache_update = update_with_copies(updates[index], runtime, attention.layer_name)
        if not kinds.is_dense:
            attention.attn_backend = planned_backend(attention.attn_backend, runtime, kinds.attention)
        for neurons in set(kinds.neurons) - {0, runtime.shape.ffn}:
            ffns[index, neurons] = VisualFFN(layer.mlp, neurons, runtime.shape.ffn, shards, pack)
    return PlannedForward(model, runtime, keys, ffns, updates, get_context)


class PlannedForward:
    """Stands in for the outer model's forward. keys, ffns, updates: by layer, what `planned_forward` cut, and how the
    engine writes keys."""

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        keys: dict[int, VisualKeys],
        ffns: dict[tuple[int, int | tuple[int, ...]], VisualFFN],
        updates: dict[int, Callable],
        get_context: Callable,
    ):
        self.original = model.forward
        self.text_model = model.language_model.model
        self.runtime, self.keys, self.ffns = runtime, keys, ffns
        self.updates, self.get_context = updates, get_context
        self.names = [layer.self_attn.attn.layer_name for layer in self.text_model.layers]
        self.rows_entered = {"attention": [0] * len(runtime.layers), "ffn": [0] * len(runtime.layers)}
        self.rows_scheduled = 0

    def __call__(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        step, context = self.runtime.take_step(), self.get_context()
        if step is None or context.attn_metadata is None:  # profiling
            return self.original(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        with self._slots(context, step):
            if not step.has_visual:
                self._count(step)
                return self.original(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            # graphs are recorded for other numbers of rows
            before, context.cudagraph_runtime_mode = context.cudagraph_runtime_mode, _no_graph(context)
            try:
                run = self._frozen if self.runtime.is_frozen(step) else self._layers
                return run(step, positions, inputs_embeds)
            finally:
                context.cudagraph_runtime_mode = before

    @contextmanager
    def _slots(self, context, step: Step):
        """The engine's slots of each layer's keys, as far as they are not those of all rows."""
        before, changed = context.slot_mapping, self.runtime.slots
        self._own = before
        if changed:
            context.slot_mapping = before | changed
        try:
            yield
        finally:
            context.slot_mapping = before

    def _frozen(self, step: Step, positions: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        text = self.runtime.rows("text", (~step.visual).nonzero()[0], embeds.device)
        visual = self.runtime.rows("visual", step.visual.nonzero()[0], embeds.device)
        for index, layer in enumerate(self.runtime.layers):
            if READ in layer.attention:
                self._write_keys(index, layer, step, embeds, positions)
        out = torch.empty_like(embeds)
        if len(text):
            # by the outer model's own call of it, which is how it was compiled
            out[text] = self.original(None, positions[..., text], None, embeds[text])
        out[visual] = self.text_model.norm(embeds[visual])
        self._count(step, len(text))
        return out

    def _layers(self, step: Step, positions: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        x = embeds.clone()
        self.rows_scheduled += step.num_rows
        for index, (layer, module) in enumerate(zip(self.runtime.layers, self.text_model.layers)):
            if READ in layer.attention:
                self._write_keys(index, layer, step, x, positions)
            rows = None
            if not layer.is_dense:
                rows = self.runtime.rows(
                    ("queries", layer.attention), step.sequences(layer.attention).rows, embeds.device
                )
            taken = x if rows is None else x[rows]
            if len(taken):
                at = positions if rows is None else positions[..., rows]
                done = module.self_attn(positions=at[..., : len(taken)], hidden_states=module.input_layernorm(taken))
                x = _added(x, rows, done)
            self.rows_entered["attention"][index] += len(taken)
            for neurons, chosen in step.ffn_groups(layer, self.runtime.shape.ffn):
                rows = self.runtime.rows(("ffn", layer.neurons, neurons), chosen, embeds.device)
                taken = module.post_attention_layernorm(x if rows is None else x[rows])
                ffn = module.mlp if neurons == self.runtime.shape.ffn else self.ffns[index, neurons]
                x = _added(x, rows, ffn(taken))
                self.rows_entered["ffn"][index] += len(taken)
        return self.text_model.norm(x)

    def _write_keys(self, index: int, layer: LayerKinds, step: Step, x: torch.Tensor, positions) -> None:
        """K and V of the visual rows that text reads in this layer and that are no queries in it."""
        rows = self.runtime.rows(("keys", layer.attention), step.rows_of(layer.attention, READ), x.device)
        if not len(rows):
            return
        module = self.text_model.layers[index]
        key, value = self.keys[index](module.input_layernorm(x[rows]), positions[..., rows])
        attention = module.self_attn.attn
        self.updates[index](attention, key, value, attention.kv_cache, self._own[attention.layer_name][rows])

    def _count(self, step: Step, rows: int | None = None) -> None:
        self.rows_scheduled += step.num_rows
        rows = step.num_rows if rows is None else rows
        for counts in self.rows_entered.values():
            for index in range(len(counts)):
                counts[index] += rows


def _added(x: torch.Tensor, rows: torch.Tensor | None, done: torch.Tensor) -> torch.Tensor:
    return x + done if rows is None else x.index_add(0, rows, done)


def _no_graph(context):
    """The mode without CUDA graphs, of the engine's own kind."""
    return type(context.cudagraph_runtime_mode).NONE
