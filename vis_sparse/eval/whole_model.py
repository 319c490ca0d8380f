"""Whole models for the benchmark, from pixels to logits: a shape's widths, fewer layers, random weights."""

from __future__ import annotations

import math

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
)
from transformers.initialization import no_init_weights

from ..cost.shape_config import shape_of_config
from ..cost.shape_lookup import load_shape, shape_names
from ..cost.shapes import ModelShape
from ..layout.image_grids import AnyRes, ShapeError, SmartResize, Tiles
from .bench_model import TEXT_BEFORE, decoder_sizes, fill_randomly

_IDS = {name: place for place, name in enumerate(("image", "video", "vision_start", "vision_end", "pad"))}
_CHANNELS = 3


def whole_config(model: str, layers: int) -> tuple[PreTrainedConfig, ModelShape]:
    """A config whose decoder has `layers` layers and whose vision tower has its share of them, and its shape.

    model: a shipped shape or a checkpoint folder. The tower has as many layers as the features are taken from, at
    least: one, or two where the last one is not read. Raises ShapeError for a model that is not described to its
    pixels.
    """
    shape = load_shape(model)
    if shape.vision is None or shape.image is None:
        raise ShapeError(f"model: got {shape.name}, whose vision tower is not described, expected a model with one")
    # a shipped name goes before a folder of that name, as in load_shape
    shipped = model in shape_names()
    config = config_of(shape) if shipped else AutoConfig.from_pretrained(model, local_files_only=True)
    config = _shallower(config, layers)
    return config, shape_of_config(config, shape.name)


def config_of(shape: ModelShape) -> PreTrainedConfig:
    """What `shape_of_config` reads a shipped shape from. Text models are Llama, or Qwen2 with biases on Q, K and V."""
    vision, rule = shape.vision, shape.image
    sizes = decoder_sizes(shape) | {"vocab_size": shape.vocab, "max_position_embeddings": 1 << 20}
    sizes |= {"pad_token_id": _IDS["pad"], "bos_token_id": None, "eos_token_id": None}
    more = {"image_token_id": _IDS["image"], "tie_word_embeddings": True}
    text = (Qwen2Config if shape.qkv_bias else LlamaConfig)(**sizes, head_dim=shape.head_dim)
    if isinstance(rule, SmartResize):
        more |= {f"{name}_token_id": _IDS[name] for name in ("video", "vision_start", "vision_end")}
        unit = shape.head_dim // 16
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * unit, 3 * unit, 3 * unit]}
        kind = Qwen2_5_VLConfig if vision.gated else Qwen2VLConfig
        return kind(text_config=sizes | {"rope_parameters": rope}, vision_config=_qwen_tower(shape), **more)
    tower = {
        "hidden_size": vision.hidden,
        "intermediate_size": vision.ffn,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
    }
    if isinstance(rule, Tiles):
        tower |= {"image_size": (rule.tile,) * 2, "patch_size": (rule.patch,) * 2, "use_qk_norm": vision.whole_norms}
        settings = {
            "downsample_ratio": 1 / rule.merge,
            "image_seq_length": (rule.tile // rule.patch // rule.merge) ** 2,
        }
        return InternVLConfig(text_config=text, vision_config=tower, **settings, **more)
    patch = math.isqrt(vision.patch_values // _CHANNELS)
    tower |= {"image_size": patch * rule.grid[0], "patch_size": patch}
    tower |= {"model_type": "clip_vision_model" if vision.class_token else "siglip_vision_model"}
    more |= {"image_seq_length": rule.grid[0] * rule.grid[1], "vision_feature_layer": -1 - vision.unread}
    if isinstance(rule, AnyRes):
        pinpoints = [list(each) for each in rule.pinpoints]
        return LlavaNextConfig(text_config=text, vision_config=tower, image_grid_pinpoints=pinpoints, **more)
    return LlavaConfig(text_config=text, vision_config=tower, **more)


def _qwen_tower(shape: ModelShape) -> dict:
    vision, rule = shape.vision, shape.image
    sizes = {"depth": vision.layers, "num_heads": vision.heads, "patch_size": rule.patch}
    sizes |= {"spatial_merge_size": rule.merge}
    sizes |= {"temporal_patch_size": vision.patch_values // _CHANNELS // rule.patch**2}
    if not vision.gated:
        return sizes | {
            "embed_dim": vision.hidden,
            "mlp_ratio": vision.ffn // vision.hidden,
            "hidden_size": shape.hidden,
        }
    return sizes | {
        "hidden_size": vision.hidden,
        "intermediate_size": vision.ffn,
        "out_hidden_size": shape.hidden,
        "window_size": vision.window * rule.patch,
        "fullatt_block_indexes": list(vision.full),
    }


def _shallower(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config with `layers` decoder layers, and of the vision tower's its first ones, as large a share."""
    data = config.to_dict()
    text, vision = data["text_config"], data["vision_config"]
    share = layers / text["num_hidden_layers"]
    text["num_hidden_layers"] = layers
    if text.get("layer_types"):
        text["layer_types"] = (text["layer_types"] * -(-layers // len(text["layer_types"])))[:layers]
    depth = "depth" if "depth" in vision else "num_hidden_layers"
    vision[depth] = max(_fewest(data), round(vision[depth] * share))
    for indices in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if indices in vision:
            vision[indices] = [index for index in vision[indices] if index < vision[depth]]
    return type(config).from_dict(data)


def _fewest(config: dict) -> int:
    """Layers of a tower without which a model has no features to take."""
    levels = config.get("vision_feature_layer", config.get("vision_feature_layers", -1))
    return max(abs(level) for level in (levels if isinstance(levels, list | tuple) else [levels]))


def whole_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a config, with uniform random weights and norms of 1."""
    config.dtype = dtype
    with device, no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    model.tie_weights()
    model.generation_config.eos_token_id = None
    fill_randomly(model, torch.Generator(device).manual_seed(0))
    return model


def image_prompt(
    model: PreTrainedModel, shape: ModelShape, batch: int, text_tokens: int, image_size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """What a processor makes of `batch` prompts of `text_tokens` tokens of text, with an image of `image_size`
    (height, width) pixels in each: random text, pixels standard normal, on the model's device.

    The image stands after LLaVA-1.5's 35 prompt tokens, and at least one text token follows it.
    """
    generator, encoded = torch.Generator().manual_seed(1), shape.image.encode(*image_size)
    visual, image = sum(math.prod(grid) for grid in encoded.grids), model.config.image_token_id
    words = torch.tensor(_words(model.config))
    ids = words[torch.randint(len(words), (batch, visual + text_tokens), generator=generator)]
    start = min(TEXT_BEFORE, text_tokens - 1)
    ids[:, start : start + visual] = image
    size, more = _pixels(shape, encoded.sequences, batch)
    if isinstance(shape.image, AnyRes):
        more = {"image_sizes": torch.tensor([image_size] * batch)}
    if isinstance(shape.image, SmartResize):
        more |= {"mm_token_type_ids": (ids == image).long()}
    pixels = torch.randn(*size, generator=generator).to(model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _words(config: PreTrainedConfig) -> list[int]:
    """Tokens that stand for themselves."""
    special = {value for name, value in config.to_dict().items() if name.endswith(("_token_id", "_token_index"))}
    return [token for token in range(min(config.get_text_config().vocab_size, 1000)) if token not in special]


def _pixels(shape: ModelShape, sequences: tuple[tuple[int, int], ...], batch: int) -> tuple[tuple[int, ...], dict]:
    """Sizes of the pixels of `batch` images, and what the model is told of them."""
    rule, values = shape.image, shape.vision.patch_values
    if isinstance(rule, SmartResize):
        ((height, width),) = sequences
        return (batch * height * width, values), {"image_grid_thw": torch.tensor([[1, height, width]] * batch)}
    sides = [side * math.isqrt(values // _CHANNELS) for side in sequences[0]]
    if isinstance(rule, AnyRes):
        return (batch, len(sequences), _CHANNELS, *sides), {}
    return (batch * len(sequences), _CHANNELS, *sides), {}
