"""What a patched model carries: an executor a plan, and the functions that hand the model's calls to it.

Nothing here is a call's own: what a call brings is held by `scopes`, in the cache that it passes, or on the stack.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ..executor.cache import LaneCacheLayer
from ..executor.call import Call
from ..executor.decoder import Decoder
from ..executor.kept_calls import KeptCalls
from ..executor.lanes import LaneExecutor
from ..executor.prompt_graphs import PromptGraphs
from ..executor.recorded import bucket, may_replay
from ..executor.step_graphs import StepGraphs
from ..executor.steps import Step, StepPacking
from ..executor.tokens import ranking_rows
from ..executor.transformers_internals import (
    CACHE,
    cache_layers,
    holds_lanes,
    is_fixed,
    new_cache,
    output_of,
    set_cache_layers,
    static_columns,
)
from ..kernels import Backend
from ..layout.layout import LayoutError, VisualLayout
from ..layout.packing import Packing, pack, text_coordinates
from ..plans.carried import to_block
from ..plans.measured import MeasuredPlan
from ..plans.plan import VisualPlan
from . import stand_ins
from .arguments import Asked, added_rows, check_arguments, check_mask, host_mask, planes, wants_hidden
from .before import tokens_of_call
from .errors import PatchError
from .family import Family, Running
from .saving import save_pretrained
from .scopes import held
from .static import check_causal, columns_read, step
from .tower_patch import PatchedTower
from .wraps import blocks, check_devices, check_structure, check_wraps, refuse_replicas


class PatchState:
    """Lives on the outer and the text model as `_vis_sparse`, from `install` to `remove`.

    plans: by name, heads resolved; the first is the one that calls run under which name none. whole: the model, or
    PEFT's wrapper that was given to `patch` with it inside. graphs: whether calls are recorded and run as graphs.
    """

    def __init__(
        self,
        family: Family,
        model: nn.Module,
        decoder: Decoder,
        plans: Mapping[str, VisualPlan],
        backend: Backend,
        whole: nn.Module,
        graphs: bool = False,
    ):
        self.family, self.model, self.backend, self._whole = family, model, backend, whole
        self.outer = family.outer_model(model)
        self.text_model = family.text_model(self.outer)
        self.plans = dict(plans)
        self._sizes = decoder.num_heads, decoder.ffn_size
        self.executors = {name: LaneExecutor(decoder, plan, backend) for name, plan in plans.items()}
        # recorded decode steps and prompts of each plan
        self.graphs = {name: (StepGraphs(run), PromptGraphs(run)) for name, run in self.executors.items() if graphs}
        self.default = next(iter(plans))
        self.measured: MeasuredPlan | None = None  # by which "auto" was chosen
        self.tower: PatchedTower | None = None  # where a plan has a section for it
        # plan and tables of the last call that ran in lanes, and of the last whole prompt among them: to look at
        self.last: tuple[str, Packing | StepPacking] | None = None
        self.last_prompt: tuple[str, Packing] | None = None
        self._blocks = blocks(self.text_model)
        self.kept_calls = KeptCalls()
        self._warned = self._said = False

    @property
    def block(self) -> dict:
        """What a checkpoint saved from the model carries."""
        return to_block(self.plans, *self._sizes, None if self.tower is None else self.tower.sizes)

    # Installing

    def install(self) -> None:
        self._replaced: list[tuple[nn.Module, str, object]] = []
        self._plain_forward = self.text_model.forward
        for module in {self.outer, self.text_model}:
            module._vis_sparse = self
        self._replace(self.text_model, "forward", stand_ins.text_forward)
        self._replace(self.text_model, "_apply", stand_ins.apply)
        self._replace(self.text_model, "_replicate_for_data_parallel", refuse_replicas)
        for name, function in self.family.methods.items():
            self._replace(self.outer, name, function)
        self._replace(self.outer, "forward", stand_ins.outer_forward)
        if self.model is not self.outer:
            self._replace(self.model, "forward", stand_ins.labelled_forward)
        if hasattr(self.model, "generate"):
            self._replace(self.model, "generate", stand_ins.generate)
        for saved in {id(each): each for each in (self.model, self._whole)}.values():
            if hasattr(saved, "save_pretrained"):
                self._replace(saved, "save_pretrained", save_pretrained)
        for module, name, function in () if self.tower is None else self.tower.replaced():
            self._replace(module, name, function)

    def _replace(self, module: nn.Module, name: str, function) -> None:
        """Set `module.name` to `function(state, plain, ...)`, plain: what stood there. A partial: those pickle."""
        plain = getattr(module, name)
        replaced = functools.partial(function, self, plain)
        self._replaced.append((module, name, vars(module).get(name)))
        setattr(module, name, functools.update_wrapper(replaced, plain, ("__name__", "__doc__"), ()))

    def remove(self) -> None:
        for module in {self.outer, self.text_model}:
            del module._vis_sparse
        for module, name, previous in reversed(self._replaced):
            if previous is None:
                delattr(module, name)
            else:
                setattr(module, name, previous)
        self._replaced = []
        self.forget_graphs()

    def forget_graphs(self) -> None:
        for kept in (each for pair in self.graphs.values() for each in pair):
            kept.forget()

    # The plan and the layout of a call

    def plan_of(self, cache) -> str:
        """The name of the plan that a call runs under: the one asked for, that of its cache, or the default."""
        asked = held(self.text_model, "plan")
        if asked is not None and asked not in self.plans:
            raise PatchError(f"plan: got {asked!r}, expected one of {', '.join(self.plans)}, those given to patch")
        if not holds_lanes(cache):
            return self.default if asked is None else asked
        plan = cache_layers(cache)[0].book.plan
        name = next((name for name, own in self.plans.items() if own == plan), None)
        if name is None or asked is not None and self.plans[asked] != plan:
            expected = f"plan {asked!r}" if asked else " or ".join(f"plan {own!r}" for own in self.plans)
            raise PatchError(
                f"{CACHE}: got a cache filled under plan {plan.name!r} with other heads or layers, expected "
                f"one filled under {expected}"
            )
        return name if asked is None else asked

    @property
    def running(self) -> Running | None:
        """What is known of the call of the outer model that runs in this context."""
        running = stand_ins.RUNNING.get()
        return running[1] if running is not None and running[0] is self else None

    def layout_of(
        self, given: VisualLayout | None, batch: int, length: int, past: int, without_ids: bool
    ) -> VisualLayout:
        """The segments of a call: those `given` by `use_layout` around it, or else what it tells itself."""
        running = self.running
        layout = None if running is None else running.layout
        if given is not None:
            layout = given.expanded(batch)
        if layout is None:
            if without_ids and length > 1 and not self._warned:
                self._warned = True
                warnings.warn(
                    "vis_sparse: inputs_embeds without input_ids: where the visual tokens lie is unknown, so this "
                    "call runs dense; give the layout with vis_sparse.use_layout(model, layout) around the call, in "
                    "the thread or generator that makes it",
                    stacklevel=3,
                )
            return VisualLayout(batch)
        if layout.batch_size != batch:
            raise LayoutError(f"layout: got {layout.batch_size} samples, expected the call's batch of {batch}")
        return layout.window(past, past + length)

    def prompt_ends(self, batch: int) -> np.ndarray | None:
        """(batch,) columns behind the prompts, as labels, `use_prompt` or `generate` say; None if nobody does."""
        ends = None if self.running is None else self.running.prompt_ends
        if ends is None:
            ends = held(self.text_model, "prompt_ends")
        generating = held(self.text_model, "generating")
        if ends is None and generating is not None:
            ends = generating.prompt_ends
        if ends is None:
            return None
        if batch % len(ends):
            raise PatchError(f"prompt: got {len(ends)} lengths, expected one, or one for each of {batch} samples")
        return ends.repeat(batch // len(ends))

    # The text model's forward

    @torch.compiler.disable
    def _checked(self, batch, length, attention_mask, position_ids, cache, without_ids, kwargs):
        """What a call in lanes asks for; None of one that the original forward runs."""
        capacity = static_columns(cache)
        if is_fixed(cache):
            capacity = cache_layers(cache)[0].book.fixed.capacity
            for layer in cache_layers(cache):
                layer.thaw()
        past = 0 if cache is None else cache.get_seq_length()
        given = held(self.text_model, "layout")
        layout = self.layout_of(given, batch, length, past, without_ids)
        in_lanes = holds_lanes(cache)
        if past and not in_lanes and given is not None and given.before(past).segments:
            raise LayoutError(
                f"{CACHE}: got a plain cache of {past} columns with visual segments of the layout in them, "
                "expected a cache that this patched model filled"
            )
        if not (layout.segments or in_lanes):
            return None
        if capacity is not None:
            attention_mask = check_causal(attention_mask, columns_read(attention_mask), past, length)
            if past + length > capacity:
                raise PatchError(f"{CACHE}: got {past + length} columns, expected at most its {capacity}")
        check_arguments(self.text_model.config, attention_mask, position_ids, cache, length, past, kwargs)
        if layout.segments:
            check_devices(getattr(self.model, "hf_device_map", None))
        name = self.plan_of(cache)
        executor = self.executors[name]
        check_structure(self.text_model, self._blocks)
        bound = executor.bound()
        if layout.segments:
            check_wraps(self.text_model.layers, self._blocks, bound)
        if cache is not None and executor.checkpoints:
            raise PatchError(f"{CACHE}: got a cache under gradient checkpointing, expected none")
        if layout.segments:
            executor.kept_cuts.refresh(bound)
        check_mask(attention_mask, past + length)
        is_step = in_lanes and past > 0 and length == 1 and not layout.segments
        mask = attention_mask if is_step else host_mask(attention_mask)
        return Asked(name, layout, length, past, mask, is_step, bound, capacity)

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
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        config = self.text_model.config
        if is_fixed(past_key_values) and length == 1 and self._takes_step(past_key_values):
            embeds = self.text_model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            positions = None if position_ids is None else planes(config, position_ids)
            executor, mask = self._executor_of_step(past_key_values, kwargs), columns_read(attention_mask)
            wanted = wants_hidden(config, kwargs)
            output = step(self.text_model, executor, past_key_values, embeds, mask, positions, wanted)
            return output.to_tuple() if kwargs.get("return_dict") is False else output
        asked = self._checked(batch, length, attention_mask, position_ids, past_key_values, input_ids is None, kwargs)
        if asked is None:
            return self._plain_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE: past_key_values},
                **kwargs,
            )
        name, layout, past = asked.name, asked.layout, asked.past
        executor = self.executors[name]
        if inputs_embeds is None:
            inputs_embeds = self.text_model.embed_tokens(input_ids)
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and executor.checkpoints:
            warnings.warn("vis_sparse: use_cache=True has no effect under gradient checkpointing", stacklevel=3)
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = new_cache(config)
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        cos, sin = self.text_model.rotary_emb(inputs_embeds, position_ids=planes(config, position_ids))
        collected = [] if wants_hidden(config, kwargs) else None
        added = added_rows(kwargs.get("deepstack_visual_embeds"), layout, inputs_embeds)
        if executor.plan.before is not None and layout.segments:
            asked, added = self._taking_in(asked, inputs_embeds, added)
        rows, replays = (inputs_embeds, cos, sin), collected is None and self._replays(asked, inputs_embeds.device)
        if replays and asked.is_step:
            hidden = self.graphs[name][0].step(cache_layers(past_key_values), asked.bound, rows, asked.mask)
            packing = StepPacking(layout, past, batch)
        else:
            hidden, packing = self._in_lanes(asked, past_key_values, rows, added, collected, replays)
        hidden = self.text_model.norm(hidden)
        self.last = name, packing
        if layout.segments and not past:
            self.last_prompt = self.last
        collected = None if collected is None else (*collected, hidden)
        output = output_of(hidden, past_key_values, collected)
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    @torch.compiler.disable
    def _taking_in(self, asked: Asked, embeds: torch.Tensor, added: list) -> tuple[Asked, list]:
        """A call whose plan says which visual tokens come in, with those, and what is added to their rows."""
        said = {} if self.running is None else self.running.said
        ends = self.prompt_ends(asked.layout.batch_size)
        kept = tokens_of_call(self.plans[asked.name].before, asked, embeds, said, ends)
        if kept is None:
            return asked, added
        rows = torch.from_numpy(kept).to(embeds.device)
        return asked._replace(kept=kept), [each.index_select(0, rows) for each in added]

    def _replays(self, asked: Asked, device: torch.device) -> bool:
        """Whether a call on a device may run as a graph: decode steps, and prompts whose tables know no values."""
        is_prompt = asked.layout.segments and not asked.past and not self.executors[asked.name].drops
        if not self.graphs or not (asked.is_step or is_prompt) or not may_replay(device):
            return False
        if not asked.bound.is_recordable and not self._said:
            self._said = True
            warnings.warn(
                "vis_sparse: graphs=True: got decoder layers with modules that a graph cannot stand for (hooks, "
                "adapters, quantised or offloaded weights, other norms): calls run one operation after the other",
                stacklevel=4,
            )
        return asked.bound.is_recordable

    @torch.compiler.disable(recursive=False)
    def _in_lanes(self, asked: Asked, cache, rows, added, collected: list | None, replays: bool):
        """The decoder on a call, operation by operation or, if it `replays`, as a graph that is known: hidden states,
        and what to look at. rows: embeddings, cos and sin."""
        executor = self.executors[asked.name]
        for layer in cache_layers(cache) if holds_lanes(cache) else ():
            layer.leave()
        call, layers = self._call(asked, cache, rows[0].device, replays)
        if replays:
            hidden = self.graphs[asked.name][1].run(*rows, call, layers, added, asked.bound)
        else:
            # the first run of a call builds the tables that its backend needs, which no compiler should look into
            run = LaneExecutor.run if call.has_run else _run_eagerly
            hidden = run(executor, *rows, call, layers, collected, added, asked.bound)
            call.has_run = asked.is_step or not executor.drops  # where tokens leave, a call has tables of its own
        if asked.capacity is not None:
            for layer in layers:
                layer.fix(asked.capacity)
        return hidden, call.packing if asked.is_step else call.in_sequence

    def _takes_step(self, cache) -> bool:
        """Whether a call of one column on a static cache is a decode step, told without a look at how full it is."""
        if torch.compiler.is_compiling():
            return True
        first, running = cache_layers(cache)[0].book.length, self.running
        layouts = (held(self.text_model, "layout"), None if running is None else running.layout)
        return all(segment.end <= first for layout in layouts if layout is not None for segment in layout.segments)

    def _executor_of_step(self, cache, kwargs: dict) -> LaneExecutor:
        """That of a decode step on a static cache, after what the host can check of it."""
        if torch.compiler.is_compiling():
            plan = cache_layers(cache)[0].book.plan
            return next(executor for name, executor in self.executors.items() if self.plans[name] is plan)
        check_arguments(self.text_model.config, None, None, cache, 1, 0, kwargs)
        check_structure(self.text_model, self._blocks)
        return self.executors[self.plan_of(cache)]

    @torch.compiler.disable
    def _call(
        self, asked: Asked, cache, device: torch.device, general: bool
    ) -> tuple[Call | Step, list[LaneCacheLayer] | None]:
        """The call's tables, and the cache's lane layers; tables of a first call are kept, since prompts repeat their
        layout. general: whether they fit all texts of a bucket (`Call`)."""
        name, layout, length, past, mask = asked.name, asked.layout, asked.length, asked.past, asked.mask
        executor, batch = self.executors[name], layout.batch_size
        if asked.is_step:
            layers = cache_layers(cache)
            return executor.step(layers, mask, device), layers
        layers = None if cache is None else self._cache_layers(name, cache, batch, past, mask)
        ends = self.prompt_ends(batch) if executor.ranks_by_text and layout.segments else None
        tables = (None if table is None else table.tobytes() for table in (mask, ends, asked.kept))
        key = None if past else (name, layout, length, device, general, *tables)
        call = None if key is None else self.kept_calls.get(key)
        if call is None:
            own = None if mask is None else mask[:, past:]
            packing = pack(layout, length, past, own, bucket if general else None)
            ranks = None if ends is None else ranking_rows(packing, ends)
            executor.check(packing, ranks)
            packing = packing if asked.kept is None else packing.keep(asked.kept)
            book = layers[0].book if layers else executor.new_cache_layers(batch)[0].book
            book.append(packing.slots(), length)
            if asked.kept is None:
                call = Call.over(packing, book, mask, device, ranks, general)
            else:
                call = Call.over_left(packing, book, mask, device, ranks)
            if key is not None:
                self.kept_calls.keep(key, call)
        elif layers is not None:
            layers[0].book.append(call.own_slots, length)
        return call, layers

    def _cache_layers(self, name, cache, batch: int, past: int, mask: np.ndarray | None) -> list[LaneCacheLayer]:
        """The cache's lane layers; a plain cache becomes one, with its tokens as text."""
        if holds_lanes(cache):
            return cache_layers(cache)
        executor = self.executors[name]
        layers = executor.new_cache_layers(batch)
        if past:
            column = np.broadcast_to(np.arange(past), (batch, past))
            sample = np.broadcast_to(np.arange(batch)[:, None], column.shape)
            valid = np.ones(column.shape, dtype=bool) if mask is None else mask[:, :past]
            for layer in layers:
                if layer.leads:
                    layer.book.append(text_coordinates(sample, column, valid), past)
            executor.adopt([(layer.keys, layer.values) for layer in cache_layers(cache)], layers)
        set_cache_layers(cache, layers)
        return layers


@torch.compiler.disable
def _run_eagerly(executor, *args):
    return executor.run(*args)
