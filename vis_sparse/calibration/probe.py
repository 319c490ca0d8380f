"""What a plan does to the answers of some samples: logits computed from the first layer that the plan changes.

The samples' dense pass (vision tower, embeddings, every layer's input) runs once; a plan that agrees with the current
one up to a layer starts there. Layers are counted through, by places as `with_layer` has them: the vision encoder's
end at -1, the decoder's begin at 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..executor.cache import Book, Store
from ..executor.call import Call
from ..executor.kept_cuts import KeptCuts
from ..executor.lanes import LaneExecutor
from ..executor.layer import LaneLayer
from ..kernels import get_backend
from ..layout.layout import VisualLayout
from ..layout.packing import pack
from ..plans.layer_plan import LayerPlan, Neighborhood, PlanError
from ..plans.plan import VisualPlan, with_layer
from ..plans.schedule import LayerWork, schedule, tower_schedule
from .profiles import Target, arguments_of, hooked
from .samples import NO_LABEL
from .vision import Vision, VisionStates

# name -> what a layer is reduced to, alone, to see how much the answers need it
SENSITIVITY = {
    "layer off": LayerPlan.off(),
    "neighbours only": LayerPlan(attention=Neighborhood(2, "causal")),
    "no FFN": LayerPlan(ffn=0.0),
}
TOWER_SENSITIVITY = SENSITIVITY | {"neighbours only": LayerPlan(attention=Neighborhood(2, "both"))}


@dataclass
class _Batch:
    """Samples of one call. states: input of every layer and of the final norm, (batch, length, width). vision: the
    same of the vision encoder, None if it is not asked about."""

    states: list[torch.Tensor]
    cos: torch.Tensor
    sin: torch.Tensor
    call: Call
    added: Sequence[torch.Tensor]
    rows: tuple[torch.Tensor, torch.Tensor]  # (sample, column) of each row that predicts an answer's token
    labels: torch.Tensor
    weights: torch.Tensor  # of the rows: every sample counts as much
    vision: VisionStates | None


class LayerRows(NamedTuple):
    """What enters a layer's projections, (rows, width): visual rows of the current plan and of another one, and the
    other one's text rows."""

    dense: torch.Tensor
    visual: torch.Tensor
    text: torch.Tensor

    @classmethod
    def of(cls, batch: _Batch, current: torch.Tensor, other: torch.Tensor) -> LayerRows:
        """Of (batch, length, width) under the current plan and the other one."""
        call = batch.call
        (current, *_), (other, *_) = (call.split(hidden, batch.cos, batch.sin) for hidden in (current, other))
        real = torch.from_numpy(call.packing.text_valid.ravel()).to(other.device)
        return cls(current[call.num_text :], other[call.num_text :], other[: call.num_text][real])


class Probe:
    """Samples on an unpatched model, and what plans change about their answers.

    samples: as `calibrate` takes them, with labels, on the model's device. batch: samples in one call. vision: the
    model's vision encoder, for plans that change it too. Memory: the inputs of all layers for all samples.
    """

    @torch.no_grad()
    def __init__(self, target: Target, samples: Sequence[dict], batch: int = 16, vision: Vision | None = None):
        self.target, self.vision, self.backend = target, vision, get_backend()
        self.plan = VisualPlan.dense(len(target.decoder.layers)).replace(tower=vision and vision.dense)
        self._batches, layouts, lengths = [], [], []
        for group in _batches(samples, batch):
            layouts += [target.layout(sample) for sample in group]
            lengths += [sample["input_ids"].shape[1] for sample in group]
            self._batches.append(self._observe(group))
        self.layouts, self.lengths = layouts, lengths
        self._dense = [self._logits(b, b.states[-1]).log_softmax(-1) for b in self._batches]

    def _observe(self, group: list[dict]) -> _Batch:
        inputs = _collate(group)
        labels, mask, seen = inputs["labels"], inputs["attention_mask"], {}
        states = []

        def text_call(module, args, kwargs):
            seen.update(kwargs)

        target = self.target
        norms = [layer.module("input_norm") for layer in target.decoder.layers] + [target.decoder.norm]
        handle = target.text_model.register_forward_pre_hook(text_call, with_kwargs=True)
        try:
            with hooked([(norm, lambda module, args: states.append(args[0])) for norm in norms]):
                target.encode(inputs)
        finally:
            handle.remove()
        layout = target.family.read_layout(target.outer, arguments_of(inputs), 0)
        length, positions = labels.shape[1], seen.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=labels.device)[None]
        # of M-RoPE's planes the last three count
        cos, sin = target.decoder.rotary(states[0], position_ids=positions[-3:] if positions.dim() == 3 else positions)
        sample, column = (labels[:, 1:] != NO_LABEL).nonzero(as_tuple=True)
        counts = torch.bincount(sample, minlength=len(group))
        return _Batch(
            states,
            cos,
            sin,
            _call(layout, length, mask.cpu().numpy().astype(bool), self.plan, labels.device),
            list(seen.get("deepstack_visual_embeds") or ()),
            (sample, column),
            labels[sample, column + 1],
            1 / counts[sample],
            self.vision and VisionStates(self.vision, target, inputs, self.backend),
        )

    @property
    def num_samples(self) -> int:
        return len(self.layouts)

    def _logits(self, batch: _Batch, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits of the answers' rows from the final norm's input."""
        normed = self.target.decoder.norm(hidden[batch.rows])
        return self.target.model.get_output_embeddings()(normed).float()

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(height, width) in patches of every image or frame that the vision encoder sees."""
        return [grid for batch in self._batches if batch.vision for grid in batch.vision.grids]

    def _executor(self, plan: VisualPlan, start: int) -> LaneExecutor:
        if plan.before is not None or any(work.tokens is not None for work in self.work(plan)):
            raise PlanError(
                f"plan {plan.name!r}: tokens: got a plan under which visual tokens leave, expected one that keeps them "
                "all (the probe goes on from states of every visual row)"
            )
        decoder = dataclasses.replace(self.target.decoder, layers=self.target.decoder.layers[start:])
        executor = LaneExecutor(decoder, plan.replace(layers=plan.layers[start:]), self.backend)
        executor.kept_cuts.refresh()
        return executor

    def work(self, plan: VisualPlan) -> tuple[LayerWork, ...]:
        """What the decoder's layers compute under `plan`."""
        decoder = self.target.decoder
        return schedule(plan, decoder.num_heads, decoder.num_kv_heads, decoder.ffn_size)

    def tower_work(self, plan: VisualPlan) -> tuple[LayerWork | None, ...]:
        """What the vision encoder's layers compute, None for those that do not run; empty if it is not asked about."""
        if self.vision is None:
            if plan.tower is not None:
                raise PlanError(f"plan {plan.name!r}: tower: got a section, expected none (no encoder was given)")
            return ()
        tower, last = self.vision.tower, max(batch.vision.last for batch in self._batches)
        work = tower_schedule(self.tower_plan(plan), tower.num_heads, tower.ffn_size, tower.has_globals)
        return (*work[: last + 1], *(None,) * (len(work) - last - 1))

    def tower_plan(self, plan: VisualPlan) -> VisualPlan:
        """What a plan says of the vision encoder that is asked about."""
        return self.vision.dense if plan.tower is None else plan.tower

    def all_work(self, plan: VisualPlan) -> tuple[LayerWork | None, ...]:
        """Both, one after the other."""
        return self.tower_work(plan) + self.work(plan)

    def layer_call(self, work: LayerWork) -> Callable[[], object]:
        """One run of a layer that computes `work`, on the first batch."""
        decoder, batch = self.target.decoder, self._batches[0]
        layer = LaneLayer(decoder.layers[0], work, decoder, False, self.backend)
        KeptCuts(layer.cuts.values()).refresh()
        x, angles = layer.rows(batch.call, batch.states[0], batch.cos, batch.sin)
        parts = layer.bound()
        in_place = not torch.is_grad_enabled()
        return lambda: layer(x.clone(), batch.call, angles, parts, (Store(), Store()), in_place)

    def tower_layer_call(self, plan: VisualPlan, index: int) -> Callable[[], object]:
        """One run of a layer of the vision encoder as it is under its plan, on the first batch."""
        return self._batches[0].vision.layer_call(plan, index)

    def first_change(self, plan: VisualPlan) -> int:
        """The first layer that computes something else than under the current plan, its place; the number of the
        decoder's layers if none."""
        pairs = enumerate(zip(self.all_work(plan), self.all_work(self.plan), strict=True), -len(self.tower_work(plan)))
        return next((place for place, (new, old) in pairs if new != old), plan.num_layers)

    @torch.no_grad()
    def logits(self, plan: VisualPlan, every: int = 1) -> Iterator[torch.Tensor]:
        """fp32 logits (rows, vocabulary) of the answers under `plan` in every so manieth batch. Heads must be masks."""
        place = self.first_change(plan)
        start, of_tower = max(place, 0), place + len(self.tower_work(plan))
        executor = self._executor(plan, start) if start < plan.num_layers else None
        for batch in self._batches[::every]:
            hidden, added = batch.states[start], batch.added[start:]
            if place < 0:
                hidden, added = _embedded(batch.vision.text_inputs(self.tower_plan(plan), of_tower))
            if executor is not None:
                hidden = executor.run(hidden, batch.cos, batch.sin, batch.call, added=added)
            yield self._logits(batch, hidden)

    def per_sample(self, plan: VisualPlan, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(divergence, right) under a plan of every sample of every so manieth batch, float64 and bool.

        KL(dense || plan) of the next-token distributions at the answer's rows, in nats, mean over them; whether all of
        the answer's tokens are the likeliest ones (given those before them).
        """
        divergences, right = [], []
        triples = zip(self._batches[::every], self._dense[::every], self.logits(plan, every), strict=True)
        for batch, dense, logits in triples:
            rows = torch.nn.functional.kl_div(logits.log_softmax(-1), dense, reduction="none", log_target=True).sum(-1)
            wrong, zeros = (logits.argmax(-1) != batch.labels).to(rows), rows.new_zeros(batch.call.batch)
            divergences.append(zeros.index_add(0, batch.rows[0], rows * batch.weights))
            right.append(zeros.index_add(0, batch.rows[0], wrong) == 0)
        return torch.cat(divergences).cpu().double().numpy(), torch.cat(right).cpu().numpy()

    def measure(self, plan: VisualPlan, every: int = 1) -> tuple[float, float]:
        """(divergence, accuracy) of a plan: means of what `per_sample` gives."""
        divergences, right = self.per_sample(plan, every)
        return float(divergences.mean()), float(right.mean())

    def divergence(self, plan: VisualPlan) -> float:
        return self.measure(plan)[0]

    def accuracy(self, plan: VisualPlan) -> float:
        return self.measure(plan)[1]

    def walk(self, plan: VisualPlan) -> Iterator[list[LayerRows]]:
        """For each decoder layer, the rows that enter it in every batch. Begins with the current plan's; a layer runs
        under `plan` when the next one is asked for, with the weights that it has by then."""
        executor, hidden = self._executor(plan, 0), [batch.states[0] for batch in self._batches]
        for index, layer in enumerate(self.target.decoder.layers):
            norm, pairs = layer.module("input_norm"), zip(self._batches, hidden)
            yield [LayerRows.of(batch, norm(batch.states[index]), norm(now)) for batch, now in pairs]
            one = executor.alone(index)
            for number, batch in enumerate(self._batches):
                added = batch.added[index : index + 1]
                hidden[number] = one.run(hidden[number], batch.cos, batch.sin, batch.call, added=added)

    @torch.no_grad()
    def adopt(self, plan: VisualPlan) -> None:
        """Make `plan` the current one: the inputs of the layers after its first change are computed anew."""
        place = self.first_change(plan)
        start, of_tower = max(place, 0), place + len(self.tower_work(plan))
        if start < plan.num_layers:
            executor = self._executor(plan, start)
            for batch in self._batches:
                if place < 0:
                    named = batch.vision.adopt(self.tower_plan(plan), of_tower)
                    batch.states[0], batch.added = _embedded(named)
                collected: list[torch.Tensor] = []
                hidden = batch.states[start]
                last = executor.run(hidden, batch.cos, batch.sin, batch.call, None, collected, batch.added[start:])
                batch.states[start:] = [*collected, last]
        self.plan = plan


def _embedded(named: dict) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The first layer's input, and what is added behind the first layers, from what the text model is called with."""
    return named["inputs_embeds"], list(named.get("deepstack_visual_embeds") or ())


def sensitivities(target: Target, sample: dict, vision: Vision | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (layers, 3) of the decoder, and of the vision encoder if there is one: the divergence of a sample's
    answer under each reduction of `SENSITIVITY` (`TOWER_SENSITIVITY`) in each layer alone."""
    probe = Probe(target, [sample], vision=vision)

    def of(places: range, reductions: dict[str, LayerPlan]) -> torch.Tensor:
        plans = [[with_layer(probe.plan, place, each) for each in reductions.values()] for place in places]
        return torch.tensor([list(map(probe.divergence, row)) for row in plans], dtype=torch.float64)

    encoder = range(-vision.dense.num_layers if vision else 0, 0)
    return of(range(probe.plan.num_layers), SENSITIVITY), of(encoder, TOWER_SENSITIVITY)


def _call(layout: VisualLayout, length: int, mask: np.ndarray, plan: VisualPlan, device) -> Call:
    packing = pack(layout, length, 0, mask)
    book = Book(layout.batch_size, plan)
    book.append(packing.slots(), length)
    return Call(packing, book.slots, book.text_slots(), device)


def _batches(samples: Sequence[dict], size: int) -> Iterator[list[dict]]:
    """Runs of samples whose pixels can lie in one tensor."""
    group: list[dict] = []
    for sample in samples:
        if group and (len(group) == size or _pixel_shapes(sample) != _pixel_shapes(group[0])):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _is_per_token(sample: dict, name: str) -> bool:
    return sample[name].shape == sample["input_ids"].shape


def _pixel_shapes(sample: dict) -> dict:
    names = (name for name, value in sample.items() if isinstance(value, torch.Tensor))
    return {name: sample[name].shape[1:] for name in names if not _is_per_token(sample, name)}


def _collate(group: list[dict]) -> dict:
    """One batch of samples, padded on the left."""
    length = max(sample["input_ids"].shape[1] for sample in group)
    batch = {}
    for name, value in group[0].items():
        if not isinstance(value, torch.Tensor):
            batch[name] = value
        elif _is_per_token(group[0], name):
            fill = NO_LABEL if name == "labels" else 0
            batch[name] = torch.cat([_padded(sample[name], length, fill) for sample in group])
        else:
            batch[name] = torch.cat([sample[name] for sample in group])
    masks = (sample.get("attention_mask", torch.ones_like(sample["input_ids"])) for sample in group)
    return batch | {"attention_mask": torch.cat([_padded(mask, length, 0) for mask in masks])}


def _padded(row: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[1], 0), value=fill)
