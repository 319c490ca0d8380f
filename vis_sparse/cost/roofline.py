"""Roofline bounds of a plan on a GPU: for every part of a pass, the larger of FLOPs / peak and bytes / bandwidth.

A bound is a time that no implementation can beat, not a prediction. Bytes are those that must move even if everything
that can be fused is: each weight once a pass, the rows that go into and come out of a part, keys and values once.
What FLOPs hide shows here: with few rows, reading the weights once for the text rows alone sets the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plans.layer_plan import PlanError, brief
from ..plans.plan import VisualPlan
from ..plans.schedule import LayerWork, schedule
from .report import PARTS, CostReport, PassCost
from .shapes import ModelShape

_GATED_FFN = 3  # matrices of a gated FFN


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Published figures of a GPU: dense 16-bit tensor FLOP/s and bytes/s of its memory."""

    name: str
    peak: float
    bandwidth: float


DEVICES = {
    "a100": DeviceSpec("A100 SXM 80 GB", 312e12, 2.039e12),
    "h100": DeviceSpec("H100 SXM", 989.4e12, 3.35e12),
    "h200": DeviceSpec("H200 SXM", 989.4e12, 4.8e12),
    "mi300x": DeviceSpec("MI300X", 1307.4e12, 5.3e12),
}


@dataclass(frozen=True, slots=True)
class PartBound:
    """One part over all layers. seconds: the sum of each layer's bound, which may differ in what binds it."""

    flops: int
    bytes: int
    seconds: float
    compute_seconds: float

    @property
    def is_compute_bound(self) -> bool:
        """Whether FLOPs set most of the bound."""
        return self.compute_seconds > self.seconds / 2


@dataclass(frozen=True, slots=True)
class PassBound:
    """Bounds of one pass by part: "qkv", "scores", "out", "ffn", "lm_head"; before them "vision_tower" and "projector"
    where they are counted."""

    parts: dict[str, PartBound]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())


@dataclass(frozen=True, slots=True)
class Roofline:
    """Bounds of a plan's prefill, from pixels where the vision tower is counted, and of the decode step after it."""

    plan: str
    device: DeviceSpec
    prefill: PassBound
    decode: PassBound

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        data = {"plan": self.plan, "device": self.device.name}
        for name in ("prefill", "decode"):
            bound = getattr(self, name)
            parts = {
                part: {"flops": b.flops, "bytes": b.bytes, "bound_s": b.seconds} for part, b in bound.parts.items()
            }
            data[name] = {"bound_s": bound.seconds, "parts": parts}
        return data


def device_spec(name: str) -> DeviceSpec:
    """The GPU called `name`; PlanError names the known ones."""
    if name.lower() not in DEVICES:
        raise PlanError(f"device: got {brief(name)}, expected one of {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def roofline(
    shape: ModelShape, plan: VisualPlan, cost: CostReport, device: DeviceSpec, value_bytes: int = 2
) -> Roofline:
    """Bounds of `plan`, with its heads resolved, for the batch that `cost` (convention "executed") counted.

    value_bytes: of a weight, an activation and a cached value.
    """
    if cost.decode is None:
        raise PlanError(f"device: got convention {cost.convention!r}, expected executed")
    work = schedule(plan, shape.heads, shape.kv_heads, shape.ffn)
    text, layers = cost.text_tokens, list(zip(work, cost.visual_left, strict=True))
    prefill = [_layer_values(shape, item, visual, text, text, visual) for item, visual in layers]
    decode = [_layer_values(shape, item, 0, cost.batch, text + cost.batch, visual) for item, visual in layers]
    passes = ((cost.prefill, prefill), (cost.decode, decode))
    bounds = [_pass_bound(shape, counted, values, cost.batch, device, value_bytes) for counted, values in passes]
    if cost.prefill.vision_tower is not None:
        before = {part: _part_bound(steps, device) for part, steps in _before(shape, cost, value_bytes).items()}
        bounds[0] = PassBound(before | bounds[0].parts)
    return Roofline(plan.name, device, *bounds)


def _before(shape: ModelShape, cost: CostReport, value_bytes: int) -> dict[str, list[tuple[int, int]]]:
    """FLOPs and bytes of the steps before the decoder: of each layer of the tower its weights, and the rows in and out;
    of the projector its weights."""
    vision, counted = shape.vision, cost.prefill
    layers = counted.tower_layers
    matrices = vision.hidden * (4 * vision.hidden + (_GATED_FFN if vision.gated else 2) * vision.ffn)
    moved = value_bytes * (matrices + 2 * vision.hidden * cost.tower_rows)
    embedding = counted.vision_tower - sum(layer.total for layer in layers)
    steps = [(embedding, value_bytes * vision.hidden * (vision.patch_values + cost.tower_rows))]
    steps += [(layer.total, moved if layer.total else 0) for layer in layers]
    weights = value_bytes * sum(inputs * outputs for inputs, outputs in shape.projector)
    return {"vision_tower": steps, "projector": [(counted.projector, weights)]}


def _layer_values(
    shape: ModelShape, work: LayerWork, visual: int, text: int, text_keys: int, visual_keys: int
) -> dict[str, int]:
    """Numbers that move in one layer, by part. visual, text: rows; text_keys, visual_keys: tokens that are read."""
    width, hidden = shape.head_dim, shape.hidden
    queries, keys = len(work.query_heads), len(work.key_heads)
    neurons = work.neurons if isinstance(work.neurons, int) else len(work.neurons)
    attends, stores, feeds = visual if queries else 0, visual if keys else 0, visual if neurons else 0
    all_heads = shape.heads + 2 * shape.kv_heads
    read = visual_keys * keys if work.reads or attends else 0
    return {
        "qkv": hidden * width * all_heads
        + text * (hidden + width * all_heads)
        + max(attends, stores) * hidden
        + width * (attends * queries + 2 * stores * keys),
        "scores": width * 2 * (text * shape.heads + attends * queries + text_keys * shape.kv_heads + read),
        "out": hidden * width * shape.heads
        + text * (hidden + width * shape.heads)
        + attends * (hidden + width * queries),
        "ffn": _GATED_FFN * hidden * shape.ffn + 2 * hidden * (text + feeds),
    }


def _pass_bound(
    shape: ModelShape, counted: PassCost, values: list[dict], batch: int, device: DeviceSpec, value_bytes: int
) -> PassBound:
    steps = {
        part: [
            (getattr(layer.visual, part) + getattr(layer.text, part), value_bytes * moved[part])
            for layer, moved in zip(counted.layers, values, strict=True)
        ]
        for part in PARTS
    }
    head = shape.hidden * shape.vocab + batch * (shape.hidden + shape.vocab)
    steps["lm_head"] = [(counted.lm_head or 0, value_bytes * head)]
    return PassBound({part: _part_bound(each, device) for part, each in steps.items()})


def _part_bound(steps: list[tuple[int, int]], device: DeviceSpec) -> PartBound:
    seconds = compute = 0.0
    for flops, moved in steps:
        by_flops, by_bytes = flops / device.peak, moved / device.bandwidth
        seconds += max(by_flops, by_bytes)
        compute += by_flops if by_flops > by_bytes else 0.0
    return PartBound(sum(f for f, _ in steps), sum(b for _, b in steps), seconds, compute)
