"""Random plans, layouts, calls, threads and weight changes against the oracle: `python -m tests.fuzz` or `make fuzz`.

A case is made from its seed alone. It patches a small model with one to three plans and holds conversations on it, one
or several in threads at once: prompts in chunks, padded batches, operations on the cache, more turns with more images,
gradients, calls that are interrupted; then the weights change and it goes on. Whatever is computed is compared with the
float64 oracle, and at the end the unpatched model with the dense plan.

`--out FILE` keeps a line a case; started again, the run goes on behind the last one that passed. A failure stops it and
prints the line that repeats it.
"""

from __future__ import annotations

import argparse
import functools
import json
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import vis_sparse
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.plans.budgets import resolve_heads
from vis_sparse.plans.files import load_plan, plan_names
from vis_sparse.plans.layer_plan import PlanError
from vis_sparse.plans.plan import VisualPlan

from . import oracle
from .executor.test_cache import cropped, select
from .models import (
    HEADS,
    IMAGE,
    LAYERS,
    TEXT_MODELS,
    Batch,
    cuts_for,
    dropping,
    extended,
    make_model,
    random_plan,
)
from .models import make_batch as _make_batch

BOUND = 1e-5  # of the largest value compared
_ONE_AT_A_TIME = threading.Lock()


def make_batch(*arguments, **settings) -> Batch:
    """`models.make_batch`, which listens to a model's calls and so must not overlap with itself."""
    with _ONE_AT_A_TIME:
        return _make_batch(*arguments, **settings)


@functools.cache
def _models(text: str):
    """(a model that is never touched, one to patch) with equal weights."""
    return make_model(text), make_model(text)


@functools.cache
def _shipped() -> list[VisualPlan]:
    """Shipped plans that fit so small a model, which has no tower."""
    found = []
    for name in plan_names():
        try:
            found.append(resolve_heads(load_plan(name).resolve(LAYERS).replace(tower=None), HEADS, HEADS, "first"))
        except PlanError:  # it names layers that are not there
            continue
    return found


def _any_plan(rng) -> VisualPlan:
    seed = int(rng.integers(2**31))
    kind = rng.integers(8)
    if kind == 0:
        return _shipped()[seed % len(_shipped())]
    if kind < 3:
        return dropping(seed)
    return random_plan(seed, "zero" if kind == 3 else "exclude")


def _any_sample(rng) -> tuple:
    """Text, then up to three images, videos or pieces of text, then text."""
    parts = [int(rng.integers(0, 4))]
    as_ids = rng.random() < 0.5  # grids that the vision tower makes, so that the model can be called with ids
    for _ in range(rng.integers(0, 4)):
        if rng.random() < 0.3:
            parts.append(int(rng.integers(1, 4)))
        else:
            parts.append(IMAGE if as_ids else tuple(int(n) for n in rng.integers(1, (3, 6, 6))))
    return (*parts, int(rng.integers(1, 5)))


@dataclass
class Conversation:
    """One batch on one cache under one plan. ends: columns at which its calls ended. did: what was done, in words."""

    rng: np.random.Generator
    reference: torch.nn.Module
    model: torch.nn.Module
    name: str
    plan: VisualPlan
    batch: Batch
    cache: object = None
    length: int = 0
    ends: list[int] = field(default_factory=list)
    did: list[str] = field(default_factory=list)

    def hold(self) -> None:
        """The prompt, then up to four turns of the caller's choice."""
        self.say("prompt")
        for _ in range(self.rng.integers(0, 5)):
            if self.rng.random() < 0.5:
                self.change_cache()
            self.batch = self._with_turn()
            self.say("turn")

    def _with_turn(self) -> Batch:
        """The batch with a decode step, some text, or text with an image more in every sample."""
        kind = self.rng.choice(["step", "text", "image"])
        if kind != "image":
            steps = 1 if kind == "step" else int(self.rng.integers(2, 5))
            return extended(self.reference, self.batch, steps, self._seed())
        samples = [(*_any_sample(self.rng), 1) for _ in self.batch.samples]
        new = make_batch(self.reference, samples, str(self.rng.choice(["left", "right"])), self._seed())
        segments = self.batch.layout.segments + new.layout.shifted(self.batch.length).segments
        return replace(
            self.batch,
            input_ids=torch.cat([self.batch.input_ids, new.input_ids], 1),
            attention_mask=torch.cat([self.batch.attention_mask, new.attention_mask], 1),
            embeds=torch.cat([self.batch.embeds, new.embeds], 1),
            pixel_values=None,
            layout=VisualLayout(len(samples), tuple(sorted(segments, key=lambda s: (s.sample, s.start)))),
        )

    def _seed(self) -> int:
        return int(self.rng.integers(2**31))

    def say(self, what: str) -> None:
        """Feed the columns that the cache does not hold, in chunks, and compare their logits with the oracle's."""
        batch, start = self.batch, self.length
        possible = [cut for cut in cuts_for(self.plan, batch) if start < cut < batch.length]
        cuts = sorted({int(cut) for cut in self.rng.choice(possible, self.rng.integers(0, 3))}) if possible else []
        by_ids = batch.pixel_values is not None and self.rng.random() < 0.5
        self.did.append(f"{what} of {len(batch.samples)}x{batch.length - start}, cuts {cuts}{', ids' * by_ids}")
        logits = []
        for end in [*cuts, batch.length]:
            logits.append(self._call(start, end, by_ids))
            start = end
        self.ends += [*cuts, batch.length]
        self._compare(torch.cat(logits, 1))
        self.length = batch.length
        held = self.cache.get_seq_length()
        assert held == batch.length, f"the cache says {held} columns, expected {batch.length}"

    def _call(self, start: int, end: int, by_ids: bool) -> torch.Tensor:
        batch = self.batch
        call = dict(
            attention_mask=batch.attention_mask[:, :end],
            position_ids=batch.position_ids[:, start:end],
            past_key_values=self.cache,
            use_cache=True,
        )
        if by_ids:
            call["input_ids"] = batch.input_ids[:, start:end]
            pictures = [start <= s.start < end for s in batch.layout.segments]
            if any(pictures):
                call["pixel_values"] = batch.pixel_values[pictures]
        else:
            call["inputs_embeds"] = batch.embeds[:, start:end]
        layout = nullcontext() if by_ids else vis_sparse.use_layout(self.model, batch.layout)
        with layout, vis_sparse.use_plan(self.model, self.name):
            out = self.model(**call)
        self.cache = out.past_key_values
        return out.logits

    def _compare(self, logits: torch.Tensor) -> None:
        batch = self.batch
        expected = oracle.logits(
            self.model, self.plan, batch.layout, batch.embeds, batch.attention_mask, cuts=self.ends[:-1]
        )[:, self.length :]
        rows = oracle.compared_rows(self.plan, batch.layout, batch.attention_mask)[:, self.length :]
        _check(logits, expected, rows, "logits")

    def change_cache(self) -> None:
        """What beams, drafts and callers do with a cache."""
        samples = len(self.batch.samples)
        kind = str(self.rng.choice(["reorder", "repeat", "select", "mask", "crop"]))
        if kind == "crop":
            self._crop()
            return
        rows = self.rng.integers(0, samples, self.rng.integers(1, 4)).tolist()
        if kind == "repeat":
            times = int(self.rng.integers(1, 3)) if samples < 4 else 1
            rows = np.arange(samples).repeat(times).tolist()
            self.cache.batch_repeat_interleave(times)
        elif kind == "mask":
            rows = sorted(set(rows))
            self.cache.batch_select_indices(torch.tensor([row in rows for row in range(samples)]))
        elif kind == "select":
            self.cache.batch_select_indices(torch.tensor(rows))
        else:
            self.cache.reorder_cache(torch.tensor(rows))
        # pictures by sample can no longer be told from their tensor's rows
        self.batch = replace(select(self.batch, rows), pixel_values=None)
        self.did.append(f"{kind} {rows}")

    def _crop(self) -> None:
        # tokens that left did so for a whole call: only where calls ended does the oracle know what a shorter one does
        drops = any(layer.tokens for layer in self.plan.layers)
        possible = self.ends if drops else cuts_for(self.plan, self.batch)
        length = int(self.rng.choice(possible))
        self.cache.crop(length - self.length)
        if length < self.length:
            self.batch, self.length = replace(cropped(self.batch, length), pixel_values=None), length
            self.ends = [end for end in self.ends if end < length] + [length]
        self.did.append(f"crop to {length}")


def _check(actual: torch.Tensor, expected: torch.Tensor, rows, what: str) -> None:
    if not rows.any():
        return
    difference, size = (actual - expected)[rows].abs().max(), expected[rows].abs().max()
    assert difference <= BOUND * size, f"{what} differ by {difference:.3g} of {size:.3g}"


def _gradients(model, reference, plans: dict[str, VisualPlan], rng) -> str:
    """A loss over text rows, backward: the oracle's gradients."""
    name = str(rng.choice(list(plans)))
    batch = make_batch(reference, [_any_sample(rng) for _ in range(rng.integers(1, 3))], seed=int(rng.integers(2**31)))
    rows = batch.attention_mask.bool() & ~oracle.grid_of(batch.layout, batch.length).visual
    parameters = [p for p in model.model.language_model.layers.parameters()]

    def slopes(logits):
        return torch.autograd.grad(logits[rows].square().sum(), parameters, allow_unused=True)

    with torch.enable_grad():
        expected = slopes(oracle.logits(model, plans[name], batch.layout, batch.embeds, batch.attention_mask))
        with vis_sparse.use_layout(model, batch.layout), vis_sparse.use_plan(model, name):
            own = slopes(model(**batch.by_embeds() | dict(use_cache=False)).logits)
    for mine, theirs in zip(own, expected):
        theirs = torch.zeros(1) if theirs is None else theirs
        mine = torch.zeros_like(theirs) if mine is None else mine
        difference, size = (mine - theirs).abs().max(), max(1.0, float(theirs.abs().max()))
        assert difference <= BOUND * size, f"gradients under {name} differ by {difference:.3g} of {size:.3g}"
    return f"gradients under {name}"


def _interrupted(model, reference, plans: dict[str, VisualPlan], rng) -> str:
    """A prompt that a keyboard interrupt ends in some layer."""
    layer = model.model.language_model.layers[int(rng.integers(LAYERS))]
    batch = make_batch(reference, [_any_sample(rng)], seed=int(rng.integers(2**31)))

    def interrupt(*call):
        raise KeyboardInterrupt

    part = str(rng.choice(["input_layernorm", "post_attention_layernorm", "self_attn", "mlp"]))
    handle = getattr(layer, part).register_forward_pre_hook(interrupt)
    try:
        with vis_sparse.use_layout(model, batch.layout):
            model(**batch.by_embeds())
    except KeyboardInterrupt:
        return f"interrupted at {part}"
    finally:
        handle.remove()
    return f"not interrupted at {part}"


# Ways in which weights change under a patched model. Each takes the decoder layers and a random generator.


def _add_in_place(layers, generator) -> None:
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(_noise(parameter, generator))


def _add_to_data(layers, generator) -> None:
    for parameter in layers.parameters():
        parameter.data += _noise(parameter, generator)


def _new_data(layers, generator) -> None:
    for parameter in layers.parameters():
        parameter.data = parameter.data + _noise(parameter, generator)


def _new_parameters(layers, generator) -> None:
    for module in layers.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach() + _noise(parameter, generator)))


def _one_matrix(layers, generator) -> None:
    matrices = [parameter for parameter in layers.parameters() if parameter.dim() == 2]
    chosen = matrices[int(torch.randint(len(matrices), (), generator=generator))]
    chosen.data += _noise(chosen, generator)


def _load(layers, generator) -> None:
    layers.load_state_dict({name: value + _noise(value, generator) for name, value in layers.state_dict().items()})


def _through_float32(layers, generator) -> None:
    layers.float().double()


def _fused(kind) -> Callable:
    def step(layers, generator) -> None:
        for parameter in layers.parameters():
            parameter.grad = _noise(parameter, generator)
        kind(layers.parameters(), lr=0.01, fused=True).step()
        layers.zero_grad()

    return step


def _noise(tensor: torch.Tensor, generator) -> torch.Tensor:
    return 0.05 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


CHANGES: dict[str, Callable] = {
    "in place": _add_in_place,
    ".data +=": _add_to_data,
    ".data =": _new_data,
    "new parameters": _new_parameters,
    "one matrix": _one_matrix,
    "load_state_dict": _load,
    "through float32": _through_float32,
    "fused AdamW": _fused(torch.optim.AdamW),
    "fused SGD": _fused(torch.optim.SGD),
}


def run_case(seed: int) -> list[str]:
    """Run the case of a seed; returns what it did, in words. Raises AssertionError where something differs, or what
    the product raised; its `did` holds what was done until then."""
    rng = np.random.default_rng(seed)
    text = str(rng.choice(TEXT_MODELS))
    reference, model = _models(text)
    model.load_state_dict(reference.state_dict())
    plans = {f"plan {number}": _any_plan(rng) for number in range(rng.integers(1, 4))}
    backend = str(rng.choice(["reference", "torch"]))
    did = [f"{text}, {backend}, {', '.join(plan.name for plan in plans.values())}"]
    try:
        vis_sparse.patch(model, plans, backend=backend, verify=False)
        for turn in range(rng.integers(1, 4)):
            if turn:
                change = str(rng.choice(list(CHANGES)))
                CHANGES[change](model.model.language_model.layers, torch.Generator().manual_seed(seed + turn))
                did.append(f"weights: {change}")
            if rng.random() < 0.15:
                did.append(_interrupted(model, reference, plans, rng))
            if rng.random() < 0.15:
                did.append(_gradients(model, reference, plans, rng))
            _converse(model, reference, plans, rng, did)
        vis_sparse.unpatch(model)
        batch = make_batch(reference, [(2, IMAGE, 3)])
        dense = VisualPlan.dense(LAYERS)
        with torch.no_grad():
            logits = model(**batch.by_ids()).logits
            expected = oracle.logits(model, dense, batch.layout, batch.embeds, batch.attention_mask)
        _check(logits, expected, batch.attention_mask.bool(), "unpatched logits")
        return did
    except BaseException as error:
        error.did = did
        raise
    finally:
        vis_sparse.unpatch(model)


def _converse(model, reference, plans: dict[str, VisualPlan], rng, did: list[str]) -> None:
    """One conversation, or up to four at once in threads of their own."""
    talks = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        own = np.random.default_rng(rng.integers(2**31))
        name = str(own.choice(list(plans)))
        samples = [_any_sample(own) for _ in range(own.integers(1, 4))]
        padding = str(own.choice(["left", "right"]))
        batch = make_batch(reference, samples, padding, seed=int(own.integers(2**31)))
        talks.append(Conversation(own, reference, model, name, plans[name], batch))
    errors: list[BaseException] = []
    together = threading.Barrier(len(talks))

    def hold(talk: Conversation) -> None:
        try:
            with torch.no_grad():
                together.wait()
                talk.hold()
        except BaseException as error:
            errors.append(error)

    if len(talks) == 1:
        hold(talks[0])
    else:
        threads = [threading.Thread(target=hold, args=[talk]) for talk in talks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, talk in enumerate(talks):
        did += [f"{talk.name}{f' in thread {number}' * (len(talks) > 1)}: {step}" for step in talk.did]
    if errors:
        raise errors[0]


def next_seed(file: Path | None) -> int:
    """The seed that follows the last one that passed in a file of earlier cases; 0 without one."""
    lines = file.read_text().splitlines() if file is not None and file.is_file() else []
    passed = [json.loads(line)["seed"] for line in lines if line.endswith("}") and '"failed": null' in line]
    return max(passed, default=-1) + 1


def fuzz(cases: int, seconds: float, out: Path | None, start: int | None = None, tell=print) -> bool:
    """Run cases one after the other until there are so many, the time is up, or one fails; whether none did."""
    seed, end = next_seed(out) if start is None else start, time.monotonic() + seconds
    first = seed
    while seed < first + cases and time.monotonic() < end:
        failed, did = None, []
        try:
            did = run_case(seed)
        except Exception as error:
            failed, did = f"{type(error).__name__}: {error}", error.did
            traceback.print_exc()
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps({"seed": seed, "failed": failed, "did": did}) + "\n")
        if failed:
            tell(f"failed: python -m tests.fuzz --seed {seed}  ({failed})")
            return False
        seed += 1
    tell(f"{seed - first} cases passed, seeds {first} to {seed - 1}")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="how many to run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no case is started")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a line a case; a run goes on behind those there")
    parser.add_argument("--start", type=int, metavar="N", help="the first seed", default=None)
    parser.add_argument("--seed", type=int, metavar="N", help="run this case alone, and say what it does")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.seed is not None:
        try:
            print("\n".join(run_case(given.seed)))
        except Exception as error:
            print("\n".join(error.did))
            raise
        return
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    raise SystemExit(0 if fuzz(given.cases, given.seconds, given.out, given.start) else 1)


if __name__ == "__main__":
    main()
