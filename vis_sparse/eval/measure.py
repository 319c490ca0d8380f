"""What plans really cost on one model and one prompt: seconds, bytes and counted FLOPs, the unpatched model beside.

What is timed is the decoder on input embeddings, from the first layer to the final norm; vision tower, projector and
LM head are the same under every plan and stay out, of the FLOPs too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

import vis_sparse

from ..cost.flops import CostReport
from ..cost.shape_lookup import shape_of
from ..executor.transformers_internals import CACHE
from ..layout.layout import VisualLayout
from ..plans.plan import VisualPlan
from .memory import PeakBytes, cache_bytes
from .plan_strip import plan_strip
from .timing import in_turns, paired_ratio, timed

UNPATCHED, DENSE_PLAN = "unpatched", "dense"
DECODE_STEPS = 3
COMPILED_WARM_UPS = 3  # the first sizes, the sizes that changed as dynamic ones, and once with the code
# Patching leaves work to the first call: copies of weights, tables that depend on the layout. Each turn does it before
# the clock starts; where a prompt takes longer than this (seconds), with a short prompt, since the tables don't show.
FULL_WARM_UP_BELOW = 2.0


class Measurement:
    """One model, one prompt and some plans, beside them the unpatched model and the dense plan."""

    def __init__(
        self,
        model,
        embeddings: Tensor,
        layout: VisualLayout,
        plans: dict[str, VisualPlan],
        heads=None,
        compiler: str | None = None,
        graphs: bool = False,
    ):
        """embeddings: (batch, tokens, hidden), without padding. plans: by label. heads: as in `vis_sparse.patch`.

        compiler: backend of torch.compile for every variant, the unpatched model too; None: eager. graphs: of patched
        variants, as `vis_sparse.patch` takes it.
        """
        self.model, self.embeddings, self.layout, self.heads = model, embeddings, layout, heads
        self.compiler, self.graphs, self._current, self._decoder = compiler, graphs, None, None
        self.labels = tuple(plans)
        self.plans = {DENSE_PLAN: VisualPlan.dense(shape_of(model).layers)} | plans
        self.variants = (UNPATCHED, *self.plans)

    def run(self, repeats: int = 5, decode: bool = False, on_turn: Callable[[], None] = lambda: None) -> dict:
        """{label: its figures (see `_figures`) and its strip}, everything timed in turns. The model is left unpatched.

        Compiled variants and graphs are timed one after the other, since patching again would mean compiling again.
        decode: also time a decode step at the end of the prompt. on_turn: called after each of the
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
                self._prefill()
            else:
                self._touch()
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
        costs = {label: self._cost(plan) for label, plan in self.plans.items()}
        strips = {label: plan_strip(plan, costs[label], costs[DENSE_PLAN]) for label, plan in self.plans.items()}
        return {label: _figures(label, samples, sizes, costs) | {"strip": strips[label]} for label in self.labels}

    def _switch(self, variant: str) -> None:
        if variant == self._current:
            return
        if variant == UNPATCHED:
            vis_sparse.unpatch(self.model)
        else:
            vis_sparse.patch(self.model, self.plans[variant], heads=self.heads, graphs=self.graphs)
        self._current, self._decoder = variant, self.model.model.language_model

    def _compile(self, decode: bool) -> None:
        """Run the current variant, compiled if it is to be, until every shape of a turn has its code or its graph."""
        torch._dynamo.reset()
        if self.compiler:
            self._decoder = torch.compile(self._decoder, backend=self.compiler)
        for _ in range(COMPILED_WARM_UPS):
            self._seconds(decode)

    def _forward(self, embeddings: Tensor, cache=None):
        return self._decoder(inputs_embeds=embeddings, use_cache=True, **{CACHE: cache})

    def _prefill(self):
        return self._forward_image(self.embeddings, self.layout)[CACHE]

    def _touch(self) -> None:
        """A prompt of three tokens, one of them visual: whatever patching left to the first call is done after it."""
        self._forward_image(self.embeddings[:1, :3], VisualLayout.from_grids([[(1, (1, 1, 1))]]))

    def _forward_image(self, embeddings: Tensor, layout: VisualLayout):
        patched = vis_sparse.inspect(self.model) is not None
        with vis_sparse.use_layout(self.model, layout) if patched else nullcontext():
            return self._forward(embeddings)

    def _warm_up(self) -> tuple[dict[str, int], float]:
        device = self.embeddings.device

        def counted():
            with PeakBytes() as memory:
                sizes["kv_bytes"] = cache_bytes(self._prefill())
            sizes["peak_bytes"] = memory.peak

        sizes = {}
        self._touch()  # copies of weights are counted apart, not as activations
        warm_s = timed(counted, device)
        state = vis_sparse.inspect(self.model)
        sizes["copied_bytes"] = 0 if state is None else state["extra_bytes"]
        return sizes, warm_s

    def _seconds(self, decode: bool) -> dict[str, float]:
        device, kept = self.embeddings.device, []
        seconds = {"s": timed(lambda: kept.append(self._prefill()), device)}
        if decode:
            cache, token = kept.pop(), self.embeddings[:, -1:]
            self._forward(token, cache)
            steps = [timed(lambda: self._forward(token, cache), device) for _ in range(DECODE_STEPS)]
            seconds["decode_s"] = statistics.median(steps)
        return seconds

    def _cost(self, plan: VisualPlan) -> CostReport:
        text_tokens = self.embeddings.shape[1] - self.layout.num_visual // self.layout.batch_size
        return vis_sparse.flops(
            shape_of(self.model),
            plan,
            layout=self.layout,
            text_tokens=text_tokens,
            convention="executed",
            heads=self.heads,
            kv_dtype_bytes=self.embeddings.element_size(),
        )


def _figures(label: str, samples: dict, sizes: dict, costs: dict[str, CostReport]) -> dict:
    """Every figure of one plan. Seconds are medians over rounds; `spread` has the fastest and slowest round.

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
        "flops": cost.total,
        "flops_dense": dense.total,
        "flops_visual": cost.prefill.lane("visual"),
        "flops_visual_dense": dense.prefill.lane("visual"),
    }
    figures |= _times(label, samples, "s", "", dense.total / cost.total)
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
