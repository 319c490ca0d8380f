"""Shapes from transformers configs. The one place beside `patches/` that knows model families by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from ..layout.image_grids import AnyRes, FixedGrid, OneVision, ShapeError, SmartResize, Tiles
from ..layout.video_grids import FixedFrames, ResizedFrames, ResizedVideo
from ..plans.layer_plan import brief, reason
from .shapes import ModelShape, VisionShape, frozen

# What transformers, and arithmetic with what it read, raise for a config.json that holds other things than it says.
_MALFORMED = (ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError,
              StrictDataclassError)  # fmt: skip
_MOST = 1 << 31


def shape_of_folder(folder: Path) -> ModelShape:
    """The shape of the checkpoint in `folder`; only its config.json is read, and no code in it is run."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except _MALFORMED as error:
        given = f"model: got {folder}, expected a config.json that transformers knows"
        raise ShapeError(f"{given} ({reason(error)})") from None
    try:
        return shape_of_config(config, folder.resolve().name)
    except ShapeError:
        raise
    except _MALFORMED as error:
        raise ShapeError(f"model: got {folder} with a config.json that gives no sizes ({reason(error)})") from None


def shape_of_config(config, name: str) -> ModelShape:
    """The shape described by a transformers config. Families without an image rule here get the decoder only."""
    text = config.get_text_config(decoder=True)
    try:
        heads = text.num_attention_heads
        decoder = {
            "layers": text.num_hidden_layers,
            "hidden": text.hidden_size,
            "heads": heads,
            "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
            "ffn": text.intermediate_size,
            "vocab": text.vocab_size,
            "qkv_bias": text.model_type.startswith("qwen2") or bool(getattr(text, "attention_bias", False)),
        }
    except AttributeError as error:
        raise ShapeError(
            f"model: got a {config.model_type} config, expected a decoder's sizes in it ({error})"
        ) from None
    _check_sizes(decoder, name, "a decoder's")
    family = _FAMILIES.get(config.model_type)
    parts = family(config) if family else {}
    if parts:
        sizes = ("layers", "hidden", "heads", "ffn", "patch_values")
        _check_sizes({size: getattr(parts["vision"], size) for size in sizes}, name, "a vision tower's")
    return ModelShape(name, **decoder, **parts)


def _check_sizes(sizes: dict, name: str, whose: str) -> None:
    for part, size in sizes.items():
        if not isinstance(size, bool) and not (isinstance(size, int) and 0 < size < _MOST):
            raise ShapeError(f"model: got {part} {brief(size)} in {name}, expected {whose} sizes")


def _llava(config) -> dict:
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return {}
    side = vision.image_size // vision.patch_size
    # older transformers have it in the plural for VipLlava
    levels = getattr(config, "vision_feature_layer", None) or config.vision_feature_layers
    inputs = vision.hidden_size * (len(levels) if isinstance(levels, list | tuple) else 1)
    return {
        "vision": VisionShape(
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.num_attention_heads,
            vision.intermediate_size,
            vision.num_channels * vision.patch_size**2,
            vision.model_type == "clip_vision_model",
            unread=_unread(levels, vision.num_hidden_layers),
        ),
        "projector": ((inputs, config.text_config.hidden_size), (config.text_config.hidden_size,) * 2),
        "image": FixedGrid(grid=(side, side), default_size=(vision.image_size,) * 2),
    }


def _unread(levels, layers: int) -> int:
    """Layers behind the last one whose output is among a model's features (0: what goes into the first layer)."""
    levels = levels if isinstance(levels, list | tuple) else [levels]
    return layers - max(level % (layers + 1) for level in levels)


def _llava_next(config) -> dict:
    parts = _llava(config)
    if parts:
        size = config.vision_config.image_size
        parts["image"] = AnyRes(
            tile=size,
            grid=parts["image"].grid,
            pinpoints=frozen(config.image_grid_pinpoints),
            default_size=(2 * size, 2 * size),
        )
    return parts


def _llava_next_video(config) -> dict:
    parts = _llava_next(config)
    # a convolution that pools has a cost of its own
    if parts and config.spatial_pool_mode in ("average", "max"):
        rows, columns = parts["image"].grid
        pooled = (rows // config.spatial_pool_stride, columns // config.spatial_pool_stride)
        # pooled before the projector
        parts["video"] = FixedFrames(rows * columns, pooled[0] * pooled[1], pooled, is_joined=True)
    return parts


def _llava_onevision(config) -> dict:
    parts = _llava_next(config)
    if parts:
        image = parts["image"]
        fields = {field.name: getattr(image, field.name) for field in dataclasses.fields(image)}
        parts["image"] = OneVision(**fields, max_tiles=int(config.vision_aspect_ratio.removeprefix("anyres_max_")))
        rows, columns = image.grid
        # pooled after the projector
        halved = (-(-rows // 2), -(-columns // 2))
        parts["video"] = FixedFrames(rows * columns, rows * columns, halved, is_joined=True, newline=True)
    return parts


# Pixel bounds are the processors', which a config does not hold. Here: those that released checkpoints come with, and
# for videos of Qwen2-VL and Qwen2.5-VL the defaults of the video processor, a bound for each frame, none for the whole.
def _qwen2_rules(vision) -> dict:
    sides = {"patch": vision.patch_size, "merge": vision.spatial_merge_size}
    return {
        "image": SmartResize(**sides, min_pixels=3136, max_pixels=12845056, default_size=(1008, 1008)),
        "video": ResizedFrames(**sides, temporal=vision.temporal_patch_size, min_pixels=100352, max_pixels=602112),
    }


def _qwen2_vl(config) -> dict:
    vision = config.vision_config
    ffn = int(vision.embed_dim * vision.mlp_ratio)
    return _qwen2_rules(vision) | _qwen_tower(vision, vision.embed_dim, ffn, vision.hidden_size, mergers=1)


def _qwen2_5_vl(config) -> dict:
    vision = config.vision_config
    merge = vision.spatial_merge_size
    window = {
        "gated": True,
        "window": vision.window_size // merge // vision.patch_size * merge,
        "full": tuple(vision.fullatt_block_indexes),
    }
    sizes = vision.hidden_size, vision.intermediate_size, vision.out_hidden_size
    return _qwen2_rules(vision) | _qwen_tower(vision, *sizes, mergers=1, **window)


def _qwen3_vl(config) -> dict:
    vision = config.vision_config
    sides = {"patch": vision.patch_size, "merge": vision.spatial_merge_size}
    mergers = 1 + len(vision.deepstack_visual_indexes)
    return {
        **_qwen_tower(vision, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size, mergers),
        "image": SmartResize(**sides, min_pixels=65536, max_pixels=16777216, default_size=(1024, 1024)),
        "video": ResizedVideo(**sides, temporal=vision.temporal_patch_size, min_pixels=4096, max_pixels=25165824),
    }


def _qwen_tower(vision, hidden: int, ffn: int, width: int, mergers: int, **more) -> dict:
    merged = hidden * vision.spatial_merge_size**2
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "vision": VisionShape(vision.depth, hidden, vision.num_heads, ffn, values, False, **more),
        "projector": ((merged, merged), (merged, width)) * mergers,
    }


def _internvl(config) -> dict:
    vision = config.vision_config
    merge = round(1 / config.downsample_ratio)
    size, patch = vision.image_size[0], vision.patch_size[0]
    width = config.text_config.hidden_size
    side = size // patch
    tokens = side // merge
    return {
        "vision": VisionShape(
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.num_attention_heads,
            vision.intermediate_size,
            vision.num_channels * patch**2,
            True,
            unread=_unread(config.vision_feature_layer, vision.num_hidden_layers),
            whole_norms=vision.use_qk_norm,
        ),
        "projector": ((vision.hidden_size * merge**2, width), (width, width)),
        "image": Tiles(
            tile=size,
            patch=patch,
            merge=merge,
            max_tiles=12,
            thumbnail=True,
            default_size=(2 * size, 2 * size),
        ),
        "video": FixedFrames(side**2, tokens**2, (tokens, tokens), is_joined=False),
    }


_FAMILIES = {
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "vipllava": _llava,
}
MODEL_TYPES = tuple(_FAMILIES)
