"""Search: the plan for a budget, by greedy steps on measured loss per cost saved, from dense to the budget.

Every step makes one layer cheaper in one way. A candidate's loss is measured on the model from the layer that it
changes on; after a step, the candidates are measured again from the most promising one until one stays in front.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..cost import flops
from ..cost_report import CostReport
from ..heads import keep_heads
from ..plan import HeadBudget, LayerPlan, Neighborhood, PlanError, VisualPlan, with_layer
from ..shapes import shape_of

# What a share of 1 of the cost is, and of what the budget is a share.
COSTS: dict[str, Callable[[CostReport], int]] = {
    "visual": lambda cost: cost.prefill.lane("visual"),
    "prefill": lambda cost: cost.total,
    "kv": lambda cost: cost.kv_visual_bytes,
}
OBJECTIVES = ("kl", "accuracy")
SHARES = (0.75, 0.5, 0.25, 0.125)  # of heads and of neurons, step by step
RADII = (3, 2, 1)
_FREE = 1e-5  # a loss that is as good as none: among free steps the one that saves most is taken
_TIE = 0.01  # weight of KL under "accuracy", where most steps change no answer


@dataclass(frozen=True)
class Point:
    """A plan on the way: its cost as a share of the dense model's, and what was measured on the samples.

    kl: KL(dense || plan) of the answers' tokens in nats, mean over samples. accuracy: share of the samples whose whole
    answer is the likeliest.
    """

    plan: VisualPlan
    cost: float
    kl: float
    accuracy: float


def search(model, samples: Iterable[dict], *, budget: float = 0.25, **settings) -> VisualPlan:
    """The best plan that costs at most `budget` of the dense model. Settings: those of `search_front`."""
    front = list(search_front(model, samples, budget=budget, **settings))
    return min((point for point in front if point.cost <= budget), key=lambda point: point.kl).plan


def search_front(
    model,
    samples: Iterable[dict],
    *,
    budget: float = 0.25,
    cost: str = "visual",
    objective: str = "kl",
    calibration=None,
    time_limit: float | None = None,
    batch: int = 16,
) -> Iterator[Point]:
    """Every plan on the way from dense to `budget`, as it is found; the last one is within the budget.

    samples: as `calibrate` takes them, with labels. budget: share in (0, 1] of the dense model's `cost`: "visual",
    FLOPs of the visual lane in prefill; "prefill", FLOPs of the decoder; "kv", bytes of visual keys and values; counted
    on the sample of median length. objective: "kl", or "accuracy" of the labels. calibration: a `Calibration` that
    says which heads and neurons go first; made from the samples if None. time_limit: seconds after which candidates
    are not measured again before a step (each step still is). batch: samples in one call.

    Raises PlanError for settings out of range, PatchError and SampleError as `calibrate` does.
    """
    from .measure import calibrate
    from .probe import Probe
    from .profiles import Target
    from .samples import on_device

    if not 0 < budget <= 1:
        raise PlanError(f"budget: got {budget!r}, expected a share in (0, 1]")
    for name, given, known in (("cost", cost, COSTS), ("objective", objective, OBJECTIVES)):
        if given not in known:
            raise PlanError(f"{name}: got {given!r}, expected one of {', '.join(known)}")
    samples = [on_device(sample, model) for sample in samples]
    calibration = calibration or calibrate(model, samples)
    probe = Probe(Target.of(model), samples, batch)
    middle = int(np.argsort(probe.lengths, kind="stable")[probe.num_samples // 2])
    layout, length = probe.layouts[middle], probe.lengths[middle]
    shape = shape_of(model)

    def counted(plan: VisualPlan) -> int:
        return COSTS[cost](flops(shape, plan, layout=layout, text_tokens=length - layout.num_visual))

    def loss(plan: VisualPlan) -> float:
        kl = probe.divergence(plan)
        return kl if objective == "kl" else 1 - probe.accuracy(plan) + _TIE * kl

    end = None if time_limit is None else time.monotonic() + time_limit
    moves = Moves(calibration, shape.kv_heads)
    return _descend(probe, moves, counted, loss, budget, end)


def _descend(probe, moves: Moves, counted, loss, budget: float, end: float | None) -> Iterator[Point]:
    plan, whole = probe.plan, counted(probe.plan)

    def point() -> Point:
        named = plan.replace(name="searched", about="Found by vis_sparse.search")
        return Point(named, counted(plan) / whole, probe.divergence(plan), probe.accuracy(plan))

    def rate(candidate: VisualPlan) -> float:
        """Loss per share of the cost saved; infinite if nothing is saved."""
        saved = (spent - counted(candidate)) / whole
        return max(loss(candidate) - at, _FREE) / saved if saved > 0 else float("inf")

    spent, at = whole, loss(plan)
    yield point()
    everything = ((index, layer) for index in range(plan.num_layers) for layer in moves.of(plan, index))
    queue = [(rate(with_layer(plan, *move)), number, move) for number, move in enumerate(everything)]
    heapq.heapify(queue)
    count = len(queue)
    while spent > budget * whole:
        if not queue or queue[0][0] == float("inf"):
            raise PlanError(f"budget: got {budget}, expected at least {spent / whole:.3f}, what the last step leaves")
        _, number, move = heapq.heappop(queue)
        hurried = end is not None and time.monotonic() > end
        if not hurried:
            fresh = rate(with_layer(plan, *move))
            if queue and fresh > queue[0][0]:
                heapq.heappush(queue, (fresh, number, move))
                continue
        plan = with_layer(plan, *move)
        probe.adopt(plan)
        spent, at = counted(plan), loss(plan)
        yield point()
        index = move[0]
        queue = [entry for entry in queue if entry[2][0] != index]
        for layer in moves.of(plan, index):
            queue.append((rate(with_layer(plan, index, layer)), count, (index, layer)))
            count += 1
        heapq.heapify(queue)


class Moves:
    """The ways to make a layer cheaper; heads and neurons go in the order of a calibration's scores."""

    def __init__(self, calibration, num_kv_heads: int):
        self.scores, self.neurons, self.kv_heads = calibration.heads, calibration.neurons, num_kv_heads

    def of(self, plan: VisualPlan, index: int) -> Iterator[LayerPlan]:
        """Layer `index` of the plan with one thing reduced."""
        layer, change = plan.layers[index], dataclasses.replace
        if layer.attention != "none":
            own = layer.attention.radius if isinstance(layer.attention, Neighborhood) else max(RADII) + 1
            for radius in RADII:
                if radius < own:
                    yield change(layer, attention=Neighborhood(radius, "causal"))
            yield change(layer, attention="none")
        neurons, total = self._kept_neurons(layer), self.neurons.shape[1]
        for share in SHARES:
            if share * total < neurons:
                chosen = np.argsort(-self.neurons[index], kind="stable")[: int(share * total)]
                yield change(layer, ffn=tuple(sorted(chosen.tolist())))
        if neurons:
            yield change(layer, ffn=0.0)
        if layer.updates:
            yield change(layer, attention="none", ffn=0.0)
        heads = self.scores.shape[1] if layer.heads is None else sum(layer.heads)
        for share in SHARES:
            mask = keep_heads(self.scores[index : index + 1], HeadBudget(share), self.kv_heads)[0]
            if 0 < mask.sum() < heads:
                yield change(layer, heads=tuple(mask.tolist()))
        if layer.text_reads:
            yield change(layer, text_reads=False)
            yield LayerPlan.off()

    def _kept_neurons(self, layer: LayerPlan) -> int:
        kept = layer.neurons(self.neurons.shape[1])
        return kept if isinstance(kept, int) else len(kept)
