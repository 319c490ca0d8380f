"""What plans really cost on one model and one prompt: seconds, bytes and counted FLOPs, the unpatched model beside.

What is timed is the whole prefill, from pixels to the logits of the last row, and within the same calls the decoder
alone, from its input embeddings to the final norm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import vis_sparse

from ..cost.flops import CostReport
from ..cost.shape_lookup import shape_of
from ..executor.transformers_internals import CACHE
from ..patches import read_layout
from ..plans.plan import VisualPlan
from .memory import PeakBytes, cache_bytes
from .plan_strip import plan_strip
from .timing import PartTime, in_turns, paired_ratio, synchronize, timed

UNPATCHED, DENSE_PLAN = "unpatched", "dense"
DECODE_STEPS = 3
COMPILED_WARM_UPS = 3  # the first sizes, the sizes that changed as dynamic ones, and once with the code
# Patching leaves work to the first call: copies of weights, tables that depend on the layout. Each turn does it before
# the clock starts; where a prompt takes longer than this (seconds), with a small one, since the tables don't show.
FULL_WARM_UP_BELOW = 2.0


class Measurement:
    """One model, one prompt and some plans, beside them the unpatched model and the dense plan."""

    def __init__(
        self,
        model,
        inputs: Mapping[str, Tensor],
        image_size: tuple[int, int],
        plans: dict[str, VisualPlan],
        heads=None,
        compiler: str | None = None,
        graphs: bool = False,
        small: Mapping[str, Tensor] | None = None,
    ):
        """inputs: of the whole model, as its processor makes them, one image a sample, no padding. image_size: (height,
        width) of the images in pixels, before the processor. plans: by label. heads: as in `vis_sparse.patch`.

        compiler: backend of torch.compile for every variant's decoder, the unpatched one too; None: eager. graphs: of
        patched variants, as `vis_sparse.patch` takes it. small: a smaller prompt, to get a patched model ready with;
        None: the same.
        """
        self.model, self.inputs, self.heads, self.compiler, self.graphs = model, dict(inputs), heads, compiler, graphs
        self._small = self.inputs if small is None else dict(small)
        self._text_model, self._device = model.model.language_model, model.device
        self._current, self._stood = None, []
        self.layout = read_layout(model, self.inputs)
        self._image_size, self._shape = image_size, shape_of(model)
        self.labels = tuple(plans)
        self.plans = {DENSE_PLAN: VisualPlan.dense(self._shape.layers)} | plans
        self.variants = (UNPATCHED, *self.plans)

    @property
    def text_tokens(self) -> int:
        """Of a sample."""
        return self.inputs["input_ids"].shape[1] - self.layout.num_visual // self.layout.batch_size

    def run(self, repeats: int = 5, decode: bool = False, on_turn: Callable[[], None] = lambda: None) -> dict:
        """{label: its figures (see `_figures`) and its strip}, everything timed in turns. The model is left unpatched.

        Compiled variants and graphs are timed one after the other, since patching again would mean compiling again.
        decode: also time a decode step of the decoder at the end of the prompt. on_turn: called after each of the
        `repeats * len(variants)` turns.
        """
        sizes, warm_s = {}, {}

        def turn(variant: str) -> dict[str, float]:
            self._switch(variant)
            if variant not in sizes:
                sizes[variant], warm_s[variant] = self._warm_up()
                if self.compiler or self.graphs:
                    self._compile(decode)
            elif warm_s[variant] < FULL_WARM_UP_BELOW:
                self._prefill(self.inputs)
            elif variant != UNPATCHED:
                self._prefill(self._small)
            seconds = self._seconds(decode)
            on_turn()
            return seconds

        try:
            with torch.no_grad():
                one_by_one = self.compiler or self.graphs
                groups = [[variant] for variant in self.variants] if one_by_one else [self.variants]
                samples = {}
                for group in groups:
                    samples |= in_turns(group, turn, repeats)
        finally:
            self._switch(UNPATCHED)
        costs = {
            label: self._cost(plan, sizes[label]["entered"] / self.layout.num_visual)
            for label, plan in self.plans.items()
        }
        strips = {label: plan_strip(plan, costs[label], costs[DENSE_PLAN]) for label, plan in self.plans.items()}
        return {label: _figures(label, samples, sizes, costs) | {"strip": strips[label]} for label in self.labels}

    def _switch(self, variant: str) -> None:
        if variant == self._current:
            return
        self._uncompile()
        if variant == UNPATCHED:
            vis_sparse.unpatch(self.model)
        else:
            vis_sparse.patch(self.model, self.plans[variant], heads=self.heads, graphs=self.graphs)
        self._current = variant

    def _compile(self, decode: bool) -> None:
        """Run the current variant, its decoder compiled if it is to be, until every shape of a turn has its code or its
        graph."""
        torch._dynamo.reset()
        if self.compiler:
            self._stood = [vars(self._text_model).get("forward")]
            self._text_model.forward = torch.compile(self._text_model.forward, backend=self.compiler)
        for _ in range(COMPILED_WARM_UPS):
            self._seconds(decode)

    def _uncompile(self) -> None:
        """What stood in the place of the compiled forward, if anything did."""
        for stood in self._stood:
            del self._text_model.forward
            if stood is not None:
                self._text_model.forward = stood
        self._stood = []

    def _prefill(self, inputs: dict[str, Tensor]):
        return self.model(**inputs, use_cache=True, logits_to_keep=1)[CACHE]

    def _warm_up(self) -> tuple[dict[str, int], float]:
        def counted():
            with PeakBytes() as memory:
                sizes["kv_bytes"] = cache_bytes(self._prefill(self.inputs))
            sizes["peak_bytes"] = memory.peak

        sizes = {}
        self._prefill(self._small)  # copies of weights are counted apart, not as activations
        warm_s = timed(counted, self._device)
        state = vis_sparse.inspect(self.model)
        sizes["copied_bytes"] = 0 if state is None else state["extra_bytes"]
        sizes["entered"] = self.layout.num_visual if state is None else state["last_call"].entered
        return sizes, warm_s

    def _seconds(self, decode: bool) -> dict[str, float]:
        kept = []
        with PartTime(self._text_model, self._device) as decoder:
            seconds = {"s": timed(lambda: kept.append(self._prefill(self.inputs)), self._device)}
            seconds["decoder_s"] = decoder.last()
            if decode:
                cache, steps = kept.pop(), []
                for _ in range(1 + DECODE_STEPS):
                    self._step(cache)
                    synchronize(self._device)
                    steps.append(decoder.last())
                seconds["decode_s"] = statistics.median(steps[1:])
        return seconds

    def _step(self, cache) -> None:
        """One more token in every sample. Nothing is padded, so that models count its position themselves."""
        self.model(input_ids=self.inputs["input_ids"][:, -1:], use_cache=True, **{CACHE: cache})

    def _cost(self, plan: VisualPlan, entered: float) -> CostReport:
        """entered: share of the visual tokens that came into the decoder, where duplicates left."""
        by_duplicate = plan.before is not None and plan.before.by == "duplicate"
        cost = vis_sparse.flops(
            self._shape,
            plan,
            image_size=self._image_size,
            text_tokens=self.text_tokens,
            text_before=self.layout.segments[0].start,
            batch=self.layout.batch_size,
            heads=self.heads,
            kv_dtype_bytes=self.model.dtype.itemsize,
            duplicates=1 - entered if by_duplicate else 0.0,
        )
        if cost.visual_tokens != self.layout.num_visual:
            given = f"{cost.visual_tokens} visual tokens of images of {self._image_size}"
            raise ValueError(f"image_size: got {given}, expected the prompt's {self.layout.num_visual}")
        return cost


def _figures(label: str, samples: dict, sizes: dict, costs: dict[str, CostReport]) -> dict:
    """Every figure of one plan. Seconds are medians over rounds; `spread` has the fastest and slowest round.

    Of the whole prefill; with `decoder_` of the decoder alone in prefill, with `decode_` of the decoder in a step.
    peak_bytes: of the tensors made during prefill, KV cache included. copied_bytes: weights that the plan holds twice.
    """
    cost, dense = costs[label], costs[DENSE_PLAN]
    figures = {
        "kv_bytes": sizes[label]["kv_bytes"],
        "kv_bytes_dense": sizes[UNPATCHED]["kv_bytes"],
        "kv_visual_bytes": cost.kv_visual_bytes,
        "kv_visual_bytes_dense": dense.kv_visual_bytes,
        "peak_bytes": sizes[label]["peak_bytes"],
        "peak_bytes_dense": sizes[UNPATCHED]["peak_bytes"],
        "copied_bytes": sizes[label]["copied_bytes"],
        "flops": cost.prefill.whole,
        "flops_dense": dense.prefill.whole,
        "decoder_flops": cost.total,
        "decoder_flops_dense": dense.total,
        "tower_flops": cost.prefill.vision_tower,
        "tower_flops_dense": dense.prefill.vision_tower,
        "flops_visual": cost.prefill.lane("visual"),
        "flops_visual_dense": dense.prefill.lane("visual"),
    }
    figures |= _times(label, samples, "s", "", dense.prefill.whole / cost.prefill.whole)
    figures |= _times(label, samples, "decoder_s", "decoder_", dense.total / cost.total)
    if "decode_s" in samples[label]:
        figures |= _times(label, samples, "decode_s", "decode_", dense.decode.total / cost.decode.total)
    return figures


def _times(label: str, samples: dict, quantity: str, prefix: str, flop_ratio: float) -> dict:
    series = {
        "dense_s": samples[UNPATCHED][quantity],
        "dense_plan_s": samples[DENSE_PLAN][quantity],
        "patched_s": samples[label][quantity],
    }
    median = {name: statistics.median(values) for name, values in series.items()}
    speedup = median["dense_s"] / median["patched_s"]
    figures = {
        **median,
        "spread": {name: [min(values), max(values)] for name, values in series.items()},
        "speedup": speedup,
        "speedup_paired": paired_ratio(series["dense_s"], series["patched_s"]),
        "flop_ratio": flop_ratio,
        "efficiency": speedup / flop_ratio,
        "efficiency_vs_dense_plan": median["dense_plan_s"] / median["patched_s"] / flop_ratio,
    }
    return {prefix + name: value for name, value in figures.items()}
