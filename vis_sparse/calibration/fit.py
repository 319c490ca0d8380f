"""Keys and values of visual rows under a plan, fitted to the dense model's in closed form.

Where a plan lets visual rows stand still, later layers make keys and values of rows that no training has shown them.
What the dense model's rows are there is much the same linear map of these rows whatever the image: a ridge regression
finds it, and what it changes goes into the weights of keys and values. Text rows keep theirs as far as they can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ..executor.decoder import Decoder
from ..patches import Plan
from ..patches.errors import PatchError
from ..patches.saving import save_block
from ..plans.budgets import resolve_heads
from ..plans.carried import to_block
from ..plans.files import as_plan
from ..plans.layer_plan import PlanError
from ..plans.plan import VisualPlan
from ..plans.scores import Calibration
from .probe import LayerRows, Probe
from .profiles import Target
from .samples import on_device

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the mean square of an input; the best on the batches left out is taken
_HELD_OUT = 4  # one batch of so many tells which
_CHANGED = 1e-6  # of the square of what enters a layer: less is a dense row's rounding


@dataclass(frozen=True)
class Fitted:
    """What `fit` adds to linear layers. differences: by module name, a (r, in) and b (out, r), fp32: b @ a is added.
    explained: by decoder layer, share of the squared error of keys and values beside the dense model's that is gone,
    on samples left out (None without any). disturbed: by layer, square of what is added to text rows' keys and values
    over their own."""

    plan: VisualPlan
    differences: dict[str, tuple[Tensor, Tensor]]
    explained: dict[int, float | None]
    disturbed: dict[int, float]

    @torch.no_grad()
    def add_to(self, model: nn.Module) -> None:
        """Change the weights of the unpatched model, in place."""
        for name, (a, b) in self.differences.items():
            weight = model.get_submodule(name).weight
            weight += (b @ a).to(weight)

    def save(self, folder: str | Path, model: nn.Module) -> None:
        """Write an adapter in peft's format with the plan in it, for `vis_sparse.from_pretrained(folder)`.

        model: the unpatched one, whose modules are replaced meanwhile. Raises PatchError without peft, or if nothing
        was to be fitted.
        """
        if not self.differences:
            raise PatchError(
                f"fit: plan {self.plan.name!r}: got no layer that reads other visual rows than the dense model's, "
                "expected one at least"
            )
        try:
            import peft
        except ImportError:
            raise PatchError("fit: peft is missing, expected pip install 'vis_sparse[train]'") from None
        decoder = Target.of(model).decoder
        ranks = {name: len(a) for name, (a, _) in self.differences.items()}
        config = peft.LoraConfig(
            r=max(ranks.values()), lora_alpha=max(ranks.values()), target_modules=list(ranks),
            rank_pattern=ranks, alpha_pattern=ranks,
        )  # fmt: skip
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, (a, b) in self.differences.items():
                layer = model.get_submodule(name)
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
        wrapped.peft_config["default"].base_model_name_or_path = getattr(model, "name_or_path", "")
        wrapped.save_pretrained(folder)
        wrapped.unload()
        save_block(to_block({self.plan.name: self.plan}, decoder.num_heads, decoder.ffn_size), Path(folder))


@torch.no_grad()
def fit(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    plan: Plan,
    *,
    rank: int | None = None,
    heads: str | Path | ArrayLike | None = None,
    calibration: Calibration | str | Path | None = None,
    batch: int = 8,
) -> Fitted:
    """Fit keys and values of visual rows under `plan` to those of the dense model, layer by layer.

    model: unpatched; left as it was. samples: as `calibrate` takes them, with labels. rank: of the difference of a
    layer's keys, and of its values; None: whole (as many as there are key heads times head_dim). heads, calibration:
    as in `patch`. batch: samples in one call; one of four calls is left out to choose how much the fit is held back,
    and used afterwards. Memory: the inputs of all layers for all samples. A sample with 144 visual tokens gives 144
    rows: have several times as many rows as the model is wide.

    Raises PatchError for a model that is patched, not supported or whose keys are not plain linear layers, PlanError
    for a plan that does not fit, has a section for the tower, or under which tokens leave.
    """
    target = Target.of(model)
    decoder = target.decoder
    plan = resolve_heads(
        as_plan(plan, len(decoder.layers)), decoder.num_heads, decoder.num_kv_heads, heads, calibration=calibration
    )
    plan.check_fits(len(decoder.layers), decoder.num_heads, decoder.ffn_size)
    if plan.tower is not None:
        raise PlanError(f"plan {plan.name!r}: tower: got a section, expected none (the decoder alone is fitted)")
    probe = Probe(target, [on_device(sample, model) for sample in samples], batch)
    names = {id(module): name for name, module in model.named_modules()}
    differences: dict[str, list[tuple[Tensor, Tensor]]] = {}
    explained, disturbed, before = {}, {}, {}
    try:
        for index, (rows, work) in enumerate(zip(probe.walk(plan), probe.work(plan))):
            if not work.key_heads:
                continue
            parts = _projections(decoder, index)
            found = _layer_map(rows, [module.weight[outputs] for module, outputs in parts])
            if found is None:
                continue
            change, square, explained[index], disturbed[index] = found
            for module, outputs in parts:
                weight = module.weight
                a, b = of_rank(weight[outputs].double() @ change, square, rank)
                before.setdefault(weight, weight.clone())
                weight[outputs] += (b @ a).to(weight)
                whole = b.new_zeros(len(weight), b.shape[1])
                whole[outputs] = b
                pair = a.float().cpu(), whole.float().cpu()
                differences.setdefault(names[id(module)], []).append(pair)
    finally:
        for weight, own in before.items():
            weight.copy_(own)
    joined = {
        name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1))
        for name, pairs in differences.items()
    }
    return Fitted(plan, joined, explained, disturbed)


def _projections(decoder: Decoder, index: int) -> list[tuple[nn.Linear, list[int]]]:
    """The linear layers of a decoder layer's keys and values, each with the outputs that are theirs."""
    layer, found = decoder.layers[index], []
    for part in ("key", "value"):
        module = layer.module(part)
        if type(module) is not nn.Linear:
            raise PatchError(f"fit: layer {index}: got {type(module)} for its {part}s, expected a plain nn.Linear")
        found.append((module, list(layer.outputs(part, range(decoder.num_kv_heads * decoder.head_dim)))))
    return found


@dataclass
class _Sums:
    """square: of visual rows, (in, in) float64; text: of text rows; wanted: products of visual rows with what they lack
    of the dense model's rows; error: square of the latter."""

    square: Tensor
    text: Tensor
    wanted: Tensor
    error: Tensor

    @classmethod
    def of(cls, rows: LayerRows) -> _Sums:
        dense, visual, text = (part.double() for part in rows)
        lacks = dense - visual
        return cls(visual.T @ visual, text.T @ text, visual.T @ lacks, lacks.T @ lacks)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def map(self, ridge: float) -> tuple[Tensor, Tensor]:
        """What is added to a row, as a (in, in) map from the right, and the square that it was found with."""
        square = self.square + self.text * (self.square.trace() / self.text.trace().clamp(min=1e-30))
        held = ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
        return torch.linalg.solve(square + held, self.wanted), square

    def left(self, change: Tensor, weighed: Tensor) -> float:
        """Squared error of what `weighed` = weight.T @ weight makes of the rows, with the map `change` added."""
        both = self.error - change.T @ self.wanted - self.wanted.T @ change + change.T @ self.square @ change
        return float((both * weighed).sum())


def _layer_map(rows: Sequence[LayerRows], weights: Sequence[Tensor]):
    """The map of one layer, transposed, the square of its inputs, and what `Fitted` tells; None if nothing lacks."""
    fitted = judge = None
    for number, each in enumerate(rows, 1):
        sums = _Sums.of(each)
        if number % _HELD_OUT:
            fitted = sums if fitted is None else fitted + sums
        else:
            judge = sums if judge is None else judge + sums
    every = fitted if judge is None else fitted + judge
    if every.error.trace() <= _CHANGED * every.square.trace():
        return None
    weight = torch.cat(list(weights)).double()
    weighed, nothing = weight.T @ weight, torch.zeros_like(every.square)
    ridge, explained = RIDGES[len(RIDGES) // 2], None
    if judge is not None:
        left, ridge = min((judge.left(fitted.map(ridge)[0], weighed), ridge) for ridge in RIDGES)
        explained = 1 - left / judge.left(nothing, weighed)
    change, square = every.map(ridge)
    added = float((change.T @ every.text @ change * weighed).sum()) / float((every.text * weighed).sum())
    return change.T, square, explained, added


def of_rank(difference: Tensor, square: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """a (r, in), b (out, r): the best of rank r for inputs of such a square (reduced-rank regression)."""
    vectors = torch.linalg.eigh(difference @ square @ difference.T).eigenvectors
    b = vectors[:, -min(rank or len(vectors), len(vectors)) :]
    return b.T @ difference, b
