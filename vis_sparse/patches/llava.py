"""LLaVA-1.5 and VipLlava in transformers: every image becomes the same grid."""

from __future__ import annotations

from torch import nn

from ..layout.layout import LayoutError
from .errors import PatchError
from .placeholders import Grid, Visual, family
from .tower_vit import CLIP, SIGLIP

TOWERS = (CLIP, SIGLIP)


def check_tower(outer: nn.Module) -> None:
    """Raises PatchError for towers that put tokens between the rows of an image."""
    kind = outer.config.vision_config.model_type
    if kind == "pixtral":
        raise PatchError(
            f"vision_config: got a {kind} tower, whose rows of patches have break tokens between them, expected one "
            "whose patches lie in a row (CLIP, SigLIP)"
        )


def check_strategy(outer: nn.Module, arguments: dict) -> None:
    """Raises LayoutError if the class token of the vision tower is kept, or a patch dropped: it lies in no grid."""
    strategy = arguments.get("vision_feature_select_strategy") or outer.config.vision_feature_select_strategy
    # SigLIP towers have no class token
    expected = "full" if outer.config.vision_config.model_type.startswith("siglip") else "default"
    if strategy != expected:
        raise LayoutError(
            f"vision_feature_select_strategy: got {strategy!r}, expected {expected!r} (class tokens lie in no grid)"
        )


def _llava_grids(outer: nn.Module, arguments: dict) -> list[Grid]:
    grids = _vip_grids(outer, arguments)
    strategy = arguments.get("vision_feature_select_strategy") or outer.config.vision_feature_select_strategy
    if strategy == "full" and outer.config.vision_config.model_type == "clip_vision_model":
        return [each for grid in grids for each in ((1, 1, 1), grid)]  # the class token is kept
    check_strategy(outer, arguments)
    return grids


def _vip_grids(outer: nn.Module, arguments: dict) -> list[Grid]:
    # pixel_values (images, channels, height, width)
    pixels, patch = arguments["pixel_values"], outer.config.vision_config.patch_size
    height, width = pixels.shape[-2:]
    return [(1, height // patch, width // patch)] * len(pixels)


LLAVA = family(
    "LlavaForConditionalGeneration",
    "LlavaModel",
    check=check_tower,
    towers=TOWERS,
    image=Visual("pixel_values", _llava_grids),
)
# always without the class token
VIP_LLAVA = family(
    "VipLlavaForConditionalGeneration", "VipLlavaModel", towers=TOWERS, image=Visual("pixel_values", _vip_grids)
)
