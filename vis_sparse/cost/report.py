"""What a count gives back: FLOPs by layer, lane and part, and bytes of the KV cache. Plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

PARTS = ("qkv", "scores", "out", "ffn")


@dataclass(frozen=True, slots=True)
class LaneCost:
    """FLOPs of one lane in one layer, by part. `scores` holds both products, with the keys and with the values."""

    qkv: int = 0
    scores: int = 0
    out: int = 0
    ffn: int = 0

    @property
    def total(self) -> int:
        return self.qkv + self.scores + self.out + self.ffn


@dataclass(frozen=True, slots=True)
class LayerCost:
    """FLOPs of one decoder layer, by lane."""

    visual: LaneCost
    text: LaneCost = LaneCost()

    @property
    def total(self) -> int:
        return self.visual.total + self.text.total


@dataclass(frozen=True, slots=True)
class PassCost:
    """FLOPs of one forward pass: the decoder layers, and apart from them what comes before and behind.

    vision_tower, projector, lm_head: None where they are not counted. The LM head is counted for one row a sample,
    as `generate` runs it. tower_layers: of the vision tower, class tokens in the text lane; the tower is these and its
    patch embedding. choosing: the tokens that come into the decoder, where that is products of its own.
    """

    layers: tuple[LayerCost, ...]
    tower_layers: tuple[LayerCost, ...] = ()
    vision_tower: int | None = None
    projector: int | None = None
    lm_head: int | None = None
    choosing: int = 0

    @property
    def total(self) -> int:
        """The decoder layers."""
        return sum(layer.total for layer in self.layers)

    @property
    def whole(self) -> int:
        """The decoder layers and everything counted apart from them."""
        return self.total + self.choosing + sum(part or 0 for part in (self.vision_tower, self.projector, self.lm_head))

    @property
    def is_whole(self) -> bool:
        """Whether everything is counted, from pixels to logits."""
        return None not in (self.vision_tower, self.projector, self.lm_head)

    def part(self, name: str, lane: str | None = None) -> int:
        """FLOPs of one part ("qkv", "scores", "out", "ffn") over all layers, of one lane or of both."""
        lanes = ("visual", "text") if lane is None else (lane,)
        return sum(getattr(getattr(layer, each), name) for layer in self.layers for each in lanes)

    def lane(self, name: str) -> int:
        """FLOPs of one lane ("visual" or "text") over all layers."""
        return sum(self.part(part, name) for part in PARTS)


@dataclass(frozen=True, slots=True)
class CostReport:
    """What a plan costs on a model, for one batch.

    visual_tokens, text_tokens: of the whole batch. visual_left: visual tokens that come into each layer. prefill: the
    pass over the prompt; decode: the step after it, one text row a sample, None where the convention has none.
    kv_text_bytes, kv_visual_bytes: the cache after prefill. tower_rows: patches and class tokens that go into the
    vision tower, 0 where it is not counted. executed_scores: score FLOPs that the attention backend really executes in
    prefill, if it was measured.
    """

    model: str
    plan: str
    convention: str
    batch: int
    visual_tokens: int
    text_tokens: int
    visual_left: tuple[int, ...]
    prefill: PassCost
    decode: PassCost | None
    kv_text_bytes: int
    kv_visual_bytes: int
    tower_rows: int = 0
    executed_scores: int | None = None

    @property
    def total(self) -> int:
        """FLOPs of the decoder layers in prefill; `prefill.whole` has everything from pixels to logits."""
        return self.prefill.total

    @property
    def kv_bytes(self) -> int:
        return self.kv_text_bytes + self.kv_visual_bytes

    @property
    def score_overhead(self) -> float | None:
        """Executed score FLOPs over the ideal ones, None if not measured or if there are none to execute."""
        ideal = self.prefill.part("scores")
        return None if self.executed_scores is None or not ideal else self.executed_scores / ideal

    def to_dict(self) -> dict[str, Any]:
        """Every field and total as plain numbers, for JSON."""
        data = dataclasses.asdict(self)
        for name in ("prefill", "decode"):
            cost = getattr(self, name)
            if cost is not None:
                by_part = {part: cost.part(part) for part in PARTS}
                by_lane = {lane: cost.lane(lane) for lane in ("visual", "text")}
                data[name] |= {"total": cost.total, "whole": cost.whole, "by_part": by_part, "by_lane": by_lane}
        return data | {"total": self.total, "kv_bytes": self.kv_bytes, "score_overhead": self.score_overhead}
