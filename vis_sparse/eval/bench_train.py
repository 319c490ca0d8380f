"""One training step of plans at a model's full width beside the dense step, with random weights: seconds and bytes.

A step is forward and backward through the decoder, with a loss over the text rows after the image (where answers
stand), gradients of every weight and of the input embeddings (a projector trains), and a step of SGD. Vision tower,
projector and LM head stay out. The optimizer's part is the same under every plan.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

import vis_sparse

from ..cost.flops import resolved
from ..cost.shape_lookup import load_shape
from ..patches import is_patched
from ..plans.files import shown_names
from ..plans.plan import VisualPlan
from .bench_model import TEXT_BEFORE, image_layout, random_embeddings, random_model
from .memory import PeakBytes
from .timing import in_turns, machine_facts, paired_ratio, synchronize

DENSE = "dense step"
_RATE = 1e-6
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def bench_train(
    model: str,
    plans: Sequence[str],
    *,
    layers: int = 4,
    batch: int = 1,
    text_tokens: int = 64,
    image_size: tuple[int, int] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 5,
    clock: str = "wall",
    checkpointing: bool = False,
    on_turn: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """Figures of a training step under each plan: the JSON objects of `vis-sparse bench --train`.

    model, plans, layers, batch, text_tokens, image_size, dtype: as in `bench`. clock: "wall", or "process" (seconds of
    all threads, for machines that are not idle). Seconds are medians over `repeats` rounds, in which the unpatched
    model and the plans take turns; `ratio` is the median over rounds of plan / dense. kept_bytes: what the forward pass
    keeps for the backward pass. peak_bytes: of the tensors that a step makes, gradients included, weights not.
    """
    shape, names = dataclasses.replace(load_shape(model), layers=layers), shown_names(plans)
    layout = image_layout(shape, batch, text_tokens, image_size)
    place = {"dtype": getattr(torch, dtype), "device": torch.device(device)}
    step = _Step(random_model(shape, **place), random_embeddings(shape, layout, text_tokens, **place), layout, clock)
    if checkpointing:
        step.model.gradient_checkpointing_enable({"use_reentrant": False})
    variants = {DENSE: None} | {name: resolved(plan, shape, None) for plan, name in names.items()}
    sizes = {variant: step.sizes(plan) for variant, plan in variants.items()}
    samples = in_turns(list(variants), lambda variant: step.seconds(variants[variant]), repeats, on_turn)
    step.switch(None)
    settings = {"layout": layout, "text_tokens": text_tokens, "heads": "first"}
    dense_flops = vis_sparse.flops(shape, VisualPlan.dense(layers), **settings).total
    setting = {
        "model": shape.name,
        "layers": layers,
        "batch": batch,
        "visual_tokens": layout.num_visual // batch,
        "text_tokens": text_tokens,
        "dtype": dtype,
        "repeats": repeats,
        "clock": clock,
        "checkpointing": checkpointing,
        "timed": "forward, backward and an SGD step of the decoder on input embeddings",
    }
    facts = machine_facts(place["device"])
    return [
        {
            "plan": name,
            **setting,
            **_figures(samples[DENSE], samples[name]),
            **sizes[name],
            **{f"{kind}_dense": size for kind, size in sizes[DENSE].items()},
            "flop_share": vis_sparse.flops(shape, plan, **settings).total / dense_flops,
            **facts,
        }
        for name, plan in variants.items()
        if plan is not None
    ]


def _figures(dense: dict, own: dict) -> dict:
    figures = {f"{part}_s": statistics.median(own[part]) for part in own}
    figures |= {f"{part}_dense_s": statistics.median(dense[part]) for part in dense}
    spread = {"step_s": own["step"], "step_dense_s": dense["step"]}
    figures["spread"] = {name: [min(values), max(values)] for name, values in spread.items()}
    return figures | {"ratio": paired_ratio(own["step"], dense["step"])}


class _Step:
    """A model, a prompt, and a training step of it under any plan."""

    def __init__(self, model, embeddings: torch.Tensor, layout, clock: str):
        self.model, self.embeddings, self.layout = model.train(), embeddings.requires_grad_(), layout
        self._now = CLOCKS[clock]
        self._parameters = list(model.model.language_model.layers.parameters())
        model.requires_grad_(False)
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def switch(self, plan: VisualPlan | None) -> None:
        if plan is None:
            vis_sparse.unpatch(self.model)
        else:
            vis_sparse.patch(self.model, plan, heads="first", verify=False)

    def sizes(self, plan: VisualPlan | None) -> dict[str, int]:
        """Bytes of one step, the first one: tables of the layout are made in it too."""
        self.switch(plan)
        with PeakBytes() as memory:
            loss = self._loss(self.embeddings, self.layout)
            kept = memory.live
            loss.backward()
        self.model.zero_grad()
        self.embeddings.grad = None
        return {"kept_bytes": kept, "peak_bytes": memory.peak}

    def seconds(self, plan: VisualPlan | None) -> dict[str, float]:
        """forward, backward, optimizer and step; the plan's tables are there."""
        self.switch(plan)
        with torch.no_grad():  # tables that depend on the layout
            self._loss(*self._short())
        gc.collect()
        return self._run()

    def _short(self):
        return self.embeddings[:1, :3], vis_sparse.VisualLayout.from_grids([[(1, (1, 1, 1))]])

    def _run(self) -> dict[str, float]:
        device, times = self.embeddings.device, []

        def clock() -> None:
            synchronize(device)
            times.append(self._now())

        clock()
        loss = self._loss(self.embeddings, self.layout)
        clock()
        loss.backward()
        clock()
        with torch.no_grad():
            for parameter in self._parameters:
                parameter.sub_(parameter.grad, alpha=_RATE)
                parameter.grad = None
            self.embeddings.grad = None
        clock()
        parts = dict(zip(("forward", "backward", "optimizer"), (b - a for a, b in zip(times, times[1:]))))
        return parts | {"step": times[-1] - times[0]}

    def _loss(self, embeddings: torch.Tensor, layout) -> torch.Tensor:
        decoder = self.model.model.language_model
        with vis_sparse.use_layout(self.model, layout) if is_patched(self.model) else nullcontext():
            hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        after = min(TEXT_BEFORE + layout.num_visual // layout.batch_size, hidden.shape[1] - 1)
        return hidden[:, after:].float().square().mean()
