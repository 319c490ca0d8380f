"""What a call costs the host: process time and launches of a whole model whose arithmetic is next to nothing.

A shape's depth and heads are kept, its widths and its image are not. On a device that computes faster than it is asked
to, this is the time of a call at batch 1; it can be measured on any machine.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

import vis_sparse

from ..cost.flops import resolved
from ..cost.shape_lookup import load_shape
from ..cost.shapes import ModelShape
from ..executor.transformers_internals import new_cache
from ..plans.files import shown_names
from ..plans.plan import VisualPlan
from .bench_model import VOCABULARY, random_model
from .launches import Launches
from .timing import in_turns, machine_facts, paired_ratio

HIDDEN, FFN, HEAD_DIM = 64, 128, 16
SIDE, TEXT = 4, 8  # an image of SIDE x SIDE tokens, and the text tokens around it
STEPS = 8  # decode steps of a turn
UNPATCHED, DENSE_PLAN = "unpatched", "dense"
PHASES, PARTS = ("prefill", "decode"), ("before", "layers", "after")


def bench_host(
    model: str,
    plans: list[str],
    *,
    layers: int | None = None,
    batch: int = 1,
    repeats: int = 11,
    scattered: bool = False,
    calibration: Path | None = None,
    on_turn=lambda done, total: None,
) -> list[dict]:
    """An object for the unpatched model, the dense plan and every plan: the JSON of the command.

    model: a shipped shape, or a checkpoint folder for its sizes. layers: the shape's unless given. scattered: budgets
    keep heads by random scores, which cuts through KV groups; without it and a `calibration`, the first heads.
    Each has for "prefill" and for "decode": `s` and `spread` (process time of a call, median, fastest and slowest
    round), `ratio` (over unpatched, median over rounds), `parts` (seconds before, in and after the decoder layers, of
    one turn apart), `launches` (operations without views) in all and by kind. One thread counts, so others are stopped.
    """
    with _one_thread():
        host = _host(model, plans, layers, batch, scattered, calibration)
        samples = in_turns((UNPATCHED, *host.plans), host.turn, repeats, on_turn)
        counts = {variant: host.launches(variant) for variant in samples}
        parts = {variant: host.parts(variant) for variant in samples}
        facts = machine_facts(torch.device("cpu"))
    shape = host.shape
    setting = {
        "model": shape.name,
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "scattered": scattered,
        "batch": batch,
        "visual_tokens": SIDE**2,
        "text_tokens": TEXT,
        "repeats": repeats,
        "timed": "process time, one thread, of calls of the whole model: narrow layers, a narrow tower of one layer",
    }
    return [
        {"plan": name, **setting, **{phase: _figures(phase, name, samples, counts, parts) for phase in PHASES}, **facts}
        for name in samples
    ]


def launches(
    model: str, plans: list[str], *, layers: int | None = None, batch: int = 1, scattered: bool = False
) -> dict[str, dict[str, int]]:
    """Operations without views that a prefill and a decode step dispatch, by variant and phase: the counts of
    `bench_host`, and none of its times."""
    with _one_thread():
        host = _host(model, plans, layers, batch, scattered, None)
        counts = {variant: host.launches(variant) for variant in (UNPATCHED, *host.plans)}
    return {variant: {phase: count for phase, (count, _) in found.items()} for variant, found in counts.items()}


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _host(
    model: str, plans: list[str], layers: int | None, batch: int, scattered: bool, calibration: Path | None
) -> _Host:
    shape = load_shape(model)
    shape = dataclasses.replace(
        shape, layers=layers or shape.layers, hidden=HIDDEN, ffn=FFN, head_dim=HEAD_DIM, qkv_bias=shape.qkv_bias
    )
    heads = np.random.default_rng(0).random((shape.layers, shape.heads)) if scattered else "first"
    measured = {DENSE_PLAN: VisualPlan.dense(shape.layers)}
    for plan, name in shown_names(plans).items():
        # the decoder's part of a plan: of a tower there is one layer
        measured[name] = resolved(plan, shape, calibration).replace(tower=None)
    return _Host(shape, measured, heads, batch)


def _figures(phase: str, name: str, samples: dict, counts: dict, parts: dict) -> dict:
    own, base = samples[name][phase], samples[UNPATCHED][phase]
    launches, kinds = counts[name][phase]
    return {
        "s": statistics.median(own),
        "spread": [min(own), max(own)],
        "ratio": paired_ratio(own, base),
        "parts": parts[name][phase],
        "launches": launches,
        "launches_ratio": launches / counts[UNPATCHED][phase][0],
        "launches_by_kind": kinds,
    }


class _Host:
    """The narrow model, its prompt, and which plan it is under."""

    def __init__(self, shape: ModelShape, plans: dict[str, VisualPlan], heads, batch: int):
        self.shape, self.model = shape, random_model(shape, torch.float32, torch.device("cpu"), SIDE)
        self.plans, self.heads, self.batch, self._current = plans, heads, batch, UNPATCHED
        generator = torch.Generator().manual_seed(0)
        image = self.model.config.image_token_id
        ids = torch.randint(image + 1, VOCABULARY, (batch, SIDE**2 + TEXT), generator=generator)
        ids[:, TEXT // 2 : TEXT // 2 + SIDE**2] = image
        pixels = torch.randn(batch, 3, 14 * SIDE, 14 * SIDE, generator=generator)
        self.prompt = {"input_ids": ids, "pixel_values": pixels, **self._places(0, ids.shape[1])}
        self.token = ids[:, -1:]

    def _places(self, start: int, end: int) -> dict:
        """A mask and positions as `generate` gives them."""
        positions = torch.arange(start, end)[None].expand(self.batch, -1)
        return {"attention_mask": torch.ones(self.batch, end, dtype=torch.long), "position_ids": positions}

    def switch(self, variant: str) -> None:
        if variant == self._current:
            return
        if variant == UNPATCHED:
            vis_sparse.unpatch(self.model)
        else:
            vis_sparse.patch(self.model, self.plans[variant], heads=self.heads, verify=False)
        self._current = variant

    def turn(self, variant: str) -> dict[str, float]:
        self.switch(variant)
        self._calls(_seconds, 1, 1)  # weights are cut and tables made in the first calls
        return {phase: statistics.median(values) for phase, values in self._calls(_seconds).items()}

    def parts(self, variant: str) -> dict[str, dict[str, float]]:
        """Of one turn after those that are compared: hooks around the layers are looked at in every call."""
        self.switch(variant)
        with _marked(self.model) as marks:
            self._calls(lambda call: _in_parts(call, marks), 1, 1)
            found = self._calls(lambda call: _in_parts(call, marks))
        return {phase: dict(zip(PARTS, np.median(found[phase], axis=0).tolist())) for phase in PHASES}

    def launches(self, variant: str) -> dict[str, tuple[int, dict[str, int]]]:
        """Of a prompt, and of its second decode step: in the first, stores grow."""
        self.switch(variant)
        self._calls(_seconds, 1, 1)
        return {phase: values[-1] for phase, values in self._calls(_launches, 1, 2).items()}

    def _calls(self, measure, prompts: int = 2, steps: int = STEPS) -> dict[str, list]:
        """`measure` of some prompts and of the decode steps after each."""
        length = self.prompt["input_ids"].shape[1]
        found: dict[str, list] = {phase: [] for phase in PHASES}
        gc.collect()
        gc.disable()
        try:
            for _ in range(prompts):
                cache = new_cache(self.model.config.get_text_config())
                prompt = partial(self.model, **self.prompt, past_key_values=cache)
                found["prefill"].append(measure(prompt))
                for step in range(length, length + steps):
                    call = {"input_ids": self.token, "past_key_values": cache, **self._places(step, step + 1)}
                    found["decode"].append(measure(partial(self.model, **call)))
        finally:
            gc.enable()
        return found


def _seconds(call) -> float:
    start = time.process_time_ns()
    call()
    return (time.process_time_ns() - start) / 1e9


def _in_parts(call, marks: list[int]) -> list[float]:
    marks.clear()
    start = time.process_time_ns()
    call()
    end = time.process_time_ns()
    first, last = marks[0], marks[-1]
    return [(first - start) / 1e9, (last - first) / 1e9, (end - last) / 1e9]


def _launches(call) -> tuple[int, dict[str, int]]:
    with Launches() as counted:
        call()
    return counted.totals()[0], counted.by_kind()


@contextmanager
def _marked(model):
    """A list that gets the process time where a call's layers begin and where they end."""
    marks: list[int] = []
    text_model = model.model.language_model

    def mark(*_):
        marks.append(time.process_time_ns())

    handles = [
        text_model.layers[0].input_layernorm.register_forward_pre_hook(mark),
        text_model.norm.register_forward_pre_hook(mark),
    ]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()
