"""What a patched model carries: the plan's executor, and the forward that hands its text model's calls to it."""

from __future__ import annotations

import inspect
import types
import warnings

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..executor.cache import LaneCacheLayer
from ..executor.call import Call
from ..executor.lanes import Decoder, LaneExecutor
from ..kernels import Backend
from ..layout.layout import LayoutError, VisualLayout
from ..layout.packing import Packing, pack, text_coordinates
from ..plans.plan import VisualPlan
from .errors import PatchError
from .family import Family

_KEPT_CALLS = 16


class PatchState:
    """Lives on the text model as `_vis_sparse`. Hooks on the outer model read the layout, `forward` uses it."""

    def __init__(self, family: Family, outer: nn.Module, decoder: Decoder, plan: VisualPlan, backend: Backend):
        self.family, self.outer, self.plan, self.backend = family, outer, plan, backend
        self.text_model = family.text_model(outer)
        self.executor = LaneExecutor(decoder, plan, backend)
        self.given: VisualLayout | None = None
        self.last: Packing | None = None  # of the last call that ran in lanes
        self.layout: VisualLayout | None = None  # of the running call of the outer model
        self._calls: dict = {}
        self._warned = False
        self._signature = inspect.signature(type(outer).forward)

    def install(self) -> None:
        text_model = self.text_model
        self._plain_forward = text_model.forward
        text_model._vis_sparse = self
        self._replaced: list[tuple[nn.Module, str, object]] = []
        self._replace(text_model, "forward", _forward)
        for name, wrap in self.family.methods.items():
            self._replace(self.outer, name, wrap(getattr(type(self.outer), name)))
        self._handles = [
            self.outer.register_forward_pre_hook(self._before, with_kwargs=True),
            self.outer.register_forward_hook(self._after, always_call=True),
        ]

    def _replace(self, module: nn.Module, name: str, function) -> None:
        self._replaced.append((module, name, vars(module).get(name)))
        setattr(module, name, types.MethodType(function, module))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        del self.text_model._vis_sparse
        for module, name, previous in self._replaced:
            if previous is None:
                delattr(module, name)
            else:
                setattr(module, name, previous)

    @torch.compiler.disable
    def _before(self, outer, args, kwargs):
        arguments = self._signature.bind_partial(outer, *args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        past = arguments.get("past_key_values")
        self.layout = self.family.read_layout(outer, arguments, 0 if past is None else past.get_seq_length())

    def _after(self, outer, args, output):
        self.layout = None

    @torch.compiler.disable(recursive=False)
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        """The text model's forward: in lanes if visual tokens are in the call or in the cache, the original if not."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        batch, length = tokens.shape[:2]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        layout = self._call_layout(batch, length, past, input_ids is None)
        in_lanes = past_key_values is not None and any(isinstance(c, LaneCacheLayer) for c in past_key_values.layers)
        if past and not in_lanes and self.given is not None and self.given.before(past).segments:
            raise LayoutError(
                f"past_key_values: got a plain cache of {past} columns with visual segments of the layout in them, "
                "expected a cache that this patched model filled"
            )
        if not (layout.segments or in_lanes):
            return self._plain_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        config = self.text_model.config
        _check_supported(config, attention_mask, past_key_values, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.text_model.embed_tokens(input_ids)
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and self.executor.checkpoints:
            warnings.warn("vis_sparse: use_cache=True has no effect under gradient checkpointing", stacklevel=3)
            use_cache = False
        if past_key_values is not None and self.executor.checkpoints:
            raise PatchError("past_key_values: got a cache under gradient checkpointing, expected none")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        mask = _host_mask(attention_mask, past + length)
        layers = None
        if past_key_values is not None:
            layers = self._cache_layers(past_key_values, batch, past, mask)
        call = self._call(layout, length, past, mask, layers, inputs_embeds.device)
        if layout.segments:
            self.executor.refresh()
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        if position_ids.dim() == 3:
            position_ids = position_ids[-3:]  # of M-RoPE; a plane of text positions may lie before them
        elif "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
            position_ids = position_ids.expand(3, -1, -1)  # older transformers' M-RoPE takes nothing else
        cos, sin = self.executor.decoder.rotary(inputs_embeds, position_ids=position_ids)
        wants_hidden = kwargs.get("output_hidden_states")
        wants_hidden = config.output_hidden_states if wants_hidden is None else wants_hidden
        collected = [] if wants_hidden else None
        added = _added(kwargs.get("deepstack_visual_embeds"), layout, inputs_embeds)
        # the first run of a call builds the tables that its backend needs, which no compiler should look into
        run = LaneExecutor.run if call.has_run else _run_eagerly
        hidden = run(self.executor, inputs_embeds, cos, sin, call, layers, collected, added)
        call.has_run = not self.executor.drops  # where tokens leave, a call has tables of its own
        hidden = self.executor.decoder.norm(hidden)
        self.last = call.packing
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if collected is None else (*collected, hidden),
        )
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    @torch.compiler.disable
    def _call_layout(self, batch: int, length: int, past: int, without_ids: bool) -> VisualLayout:
        layout = self.layout
        if self.given is not None:
            layout = self.given.expanded(batch)
        if layout is None:
            if without_ids and length > 1 and not self._warned:
                self._warned = True
                warnings.warn(
                    "vis_sparse: inputs_embeds without input_ids: where the visual tokens lie is unknown, so this "
                    "call runs dense; give the layout with vis_sparse.use_layout(model, layout)",
                    stacklevel=3,
                )
            return VisualLayout(batch)
        if layout.batch_size != batch:
            raise LayoutError(f"layout: got {layout.batch_size} samples, expected the call's batch of {batch}")
        return layout.window(past, past + length)

    @torch.compiler.disable
    def _cache_layers(self, cache, batch: int, past: int, mask: np.ndarray | None) -> list[LaneCacheLayer]:
        """The cache's lane layers; a plain cache becomes one, with its tokens as text."""
        if any(isinstance(layer, LaneCacheLayer) for layer in cache.layers):
            if cache.layers[0].book.plan != self.plan:
                raise PatchError(
                    f"past_key_values: got a cache filled under plan {cache.layers[0].book.plan.name!r} with other "
                    f"heads or layers, expected one filled under the model's plan {self.plan.name!r}"
                )
            return cache.layers
        layers = self.executor.new_cache_layers(batch)
        if past:
            column = np.broadcast_to(np.arange(past), (batch, past))
            sample = np.broadcast_to(np.arange(batch)[:, None], column.shape)
            valid = np.ones(column.shape, dtype=bool) if mask is None else mask[:, :past]
            for layer in layers:
                if layer.leads:
                    layer.book.append(text_coordinates(sample, column, valid), past)
            self.executor.adopt([(layer.keys, layer.values) for layer in cache.layers], layers)
        cache.layers = layers
        return layers

    @torch.compiler.disable
    def _call(self, layout, length, past, mask, cache_layers, device) -> Call:
        """The call's tables; those of a first call are kept, since prompts repeat their layout."""
        key = None if past else (layout, length, None if mask is None else mask.tobytes(), device)
        call = self._calls.get(key)
        if call is None:
            packing = pack(layout, length, past, None if mask is None else mask[:, past:])
            self.executor.check(packing)
            book = self.executor.new_cache_layers(layout.batch_size)[0].book
            if cache_layers is not None:
                book = cache_layers[0].book
            book.append(packing.slots(), length)
            call = Call.over(packing, book, mask, device)
            if key is not None:
                if len(self._calls) >= _KEPT_CALLS:
                    self._calls.pop(next(iter(self._calls)))
                self._calls[key] = call
        elif cache_layers is not None:
            cache_layers[0].book.append(call.packing.slots(), length)
        return call


@torch.compiler.disable
def _run_eagerly(executor, *args):
    return executor.run(*args)


def _forward(self, *args, **kwargs):
    return self._vis_sparse.forward(*args, **kwargs)


def _added(deepstack, layout: VisualLayout, embeds: torch.Tensor) -> list[torch.Tensor]:
    """What DeepStack adds to the visual rows after each of the first layers: theirs in sequence order, as packed."""
    added = [rows.to(embeds.device, embeds.dtype) for rows in deepstack or ()]
    if added and len(added[0]) != layout.num_visual:
        raise LayoutError(
            f"deepstack_visual_embeds: got {len(added[0])} rows, expected one for each of the call's "
            f"{layout.num_visual} visual tokens"
        )
    return added


@torch.compiler.disable
def _host_mask(attention_mask, columns: int) -> np.ndarray | None:
    """(batch, columns) bool on the host, or None if nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape[1] != columns:
        raise PatchError(
            f"attention_mask: got {attention_mask.shape[1]} columns, expected {columns} (cached ones and the call's)"
        )
    mask = attention_mask.cpu().numpy().astype(bool)
    return None if mask.all() else mask


def _check_supported(config, attention_mask, cache, kwargs) -> None:
    plain = cache is None or all(type(c) is DynamicLayer or isinstance(c, LaneCacheLayer) for c in cache.layers)
    if not isinstance(cache, DynamicCache | None) or not plain or getattr(cache, "offloading", False):
        raise PatchError(
            f"past_key_values: got {type(cache).__name__}, expected a DynamicCache (a static, quantised or offloaded "
            "cache cannot hold the lanes)"
        )
    attentions = kwargs.get("output_attentions")
    if config.output_attentions if attentions is None else attentions:
        raise PatchError(
            "output_attentions: got True on a patched model, expected False (no attention matrix is ever formed; "
            "unpatch the model to get them)"
        )
    if kwargs.get("cu_seq_lens_q") is not None:
        raise PatchError("cu_seq_lens_q: got packed sequences, expected one sequence a batch row")
    if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.dim() != 2):
        given = "a dict" if isinstance(attention_mask, dict) else f"{attention_mask.dim()} dimensions"
        raise PatchError(f"attention_mask: got {given}, expected 2 dimensions (batch, columns) of ones and zeros")
