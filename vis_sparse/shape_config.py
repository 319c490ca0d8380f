"""Shapes from transformers configs. The one place beside `patches/` that knows model families by name."""

from __future__ import annotations

from pathlib import Path

from .shapes import ModelShape, ShapeError, VisionShape, image_rule


def shape_of_folder(folder: Path) -> ModelShape:
    """The shape of the checkpoint in `folder`; only its config.json is read, and no code in it is run."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ShapeError(f"model: got {folder}, expected a config.json that transformers knows ({reason})") from None
    return shape_of_config(config, folder.resolve().name)


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
    family = _FAMILIES.get(config.model_type)
    return ModelShape(name, **decoder, **(family(config) if family else {}))


def _llava(config) -> dict:
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return {}
    side = vision.image_size // vision.patch_size
    levels = config.vision_feature_layer
    inputs = vision.hidden_size * (len(levels) if isinstance(levels, list | tuple) else 1)
    return {
        "vision": VisionShape(
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.intermediate_size,
            vision.num_channels * vision.patch_size**2,
            vision.model_type == "clip_vision_model",
        ),
        "projector": ((inputs, config.text_config.hidden_size), (config.text_config.hidden_size,) * 2),
        "image": image_rule("fixed", grid=(side, side), default_size=(vision.image_size,) * 2),
    }


def _llava_next(config) -> dict:
    parts = _llava(config)
    if parts:
        size = config.vision_config.image_size
        parts["image"] = image_rule(
            "anyres",
            tile=size,
            grid=parts["image"].grid,
            pinpoints=config.image_grid_pinpoints,
            default_size=(2 * size, 2 * size),
        )
    return parts


def _qwen2_vl(config) -> dict:
    vision = config.vision_config
    merged = vision.embed_dim * vision.spatial_merge_size**2
    return {
        "vision": VisionShape(
            vision.depth,
            vision.embed_dim,
            int(vision.embed_dim * vision.mlp_ratio),
            vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            False,
        ),
        "projector": ((merged, merged), (merged, vision.hidden_size)),
        # the pixel bounds are the image processor's, which a config does not hold: its defaults
        "image": image_rule(
            "resize",
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            min_pixels=3136,
            max_pixels=12845056,
            default_size=(1008, 1008),
        ),
    }


def _internvl(config) -> dict:
    vision = config.vision_config
    merge = round(1 / config.downsample_ratio)
    size, patch = vision.image_size[0], vision.patch_size[0]
    width = config.text_config.hidden_size
    return {
        "vision": VisionShape(
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.intermediate_size,
            vision.num_channels * patch**2,
            True,
        ),
        "projector": ((vision.hidden_size * merge**2, width), (width, width)),
        "image": image_rule(
            "tiles",
            tile=size,
            patch=patch,
            merge=merge,
            max_tiles=12,
            thumbnail=True,
            default_size=(2 * size, 2 * size),
        ),
    }


_FAMILIES = {"llava": _llava, "llava_next": _llava_next, "qwen2_vl": _qwen2_vl, "internvl": _internvl}
