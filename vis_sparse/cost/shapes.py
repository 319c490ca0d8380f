"""Model shapes: the sizes that decide what a model costs."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout.image_grids import ImageRule
from ..layout.video_grids import VideoRule


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A ViT: `layers` of width `hidden` with `heads` heads and an FFN of `ffn` neurons in two matrices.

    patch_values: inputs of the patch embedding (channels x patch area x frames). class_token: one row more than there
    are patches. unread: last layers whose results the model does not use, which run all the same where the encoder is
    unpatched. gated: an FFN of three matrices. whole_norms: queries and keys are normed over all heads at once.
    window: side, in patches, of the windows within which rows attend; 0: none. full: layers that have none anyway.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    patch_values: int
    class_token: bool
    unread: int = 0
    gated: bool = False
    whole_norms: bool = False
    window: int = 0
    full: tuple[int, ...] = ()

    @property
    def layers_read(self) -> int:
        return self.layers - self.unread

    def is_windowed(self, layer: int) -> bool:
        return self.window > 0 and layer not in self.full


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
