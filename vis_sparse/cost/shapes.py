"""Model shapes: the sizes that decide what a model costs."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout.image_grids import ImageRule
from ..layout.video_grids import VideoRule


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A plain ViT: `layers` of width `hidden` with a two-matrix FFN of `ffn` neurons.

    patch_values: inputs of the patch embedding (channels x patch area x frames). class_token: one row more than there
    are patches.
    """

    layers: int
    hidden: int
    ffn: int
    patch_values: int
    class_token: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a multimodal model. `ffn`, `vocab`, `heads`... are the decoder's; its FFN is gated (three matrices).

    projector: (inputs, outputs) of each of its matrices. vision, projector, image and video are None or empty where
    they are unknown or there are none (a bare language model): the decoder can still be counted, from a layout.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    qkv_bias: bool = False
    vision: VisionShape | None = None
    projector: tuple[tuple[int, int], ...] = ()
    image: ImageRule | None = None
    video: VideoRule | None = None


def frozen(value):
    """`value` with its lists, and those in them, as tuples."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value
