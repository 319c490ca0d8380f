"""The format of original InternVL2 checkpoints (`internvl_chat`), and what its configuration and tensors are called
in transformers' InternVLForConditionalGeneration. One tensor in, one or several out: nothing needs the whole model.

InternLM2 is Llama with its queries, keys and values in one matrix; the other text models keep their tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Phi3Config, Qwen2Config

from ..plans.atomic_write import is_file
from ..plans.layer_plan import brief, reason
from ..plans.plan import MOST_LAYERS
from .errors import MALFORMED, CheckpointError

IMAGE_TOKEN = "<IMG_CONTEXT>"
_TEXT_CONFIGS = {
    "InternLM2ForCausalLM": LlamaConfig,
    "LlamaForCausalLM": LlamaConfig,
    "Phi3ForCausalLM": Phi3Config,
    "Qwen2ForCausalLM": Qwen2Config,
}
_TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_VISION_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "norm_type", "attention_dropout"),
)
# (pattern, replacement), the first that matches is taken
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
        (r"mlp1\.1\.", "model.multi_modal_projector.linear_1."),
        (r"mlp1\.3\.", "model.multi_modal_projector.linear_2."),
        (r"vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
        (r"vision_model\.embeddings\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
        (r"vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
        (r"vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
        (r"language_model\.(output|lm_head)\.", "lm_head."),
        (r"language_model\.model\.tok_embeddings\.", "model.language_model.embed_tokens."),
        (r"language_model\.model\.", "model.language_model."),
    )
)
_VISION_LAYER = {
    "attn.proj.": "attention.projection_layer.",
    "attn.": "attention.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
_INTERNLM2_LAYER = {
    "attention.wo.": "self_attn.o_proj.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    "attention_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
}
_LAYER = re.compile(r"(?P<layers>.*\.layers?\.\d+\.)(?P<rest>.*)")


def read_config(folder: Path, image_token_id: int | None = None) -> InternVLConfig:
    """transformers' configuration of the checkpoint in `folder`.

    image_token_id: of `<IMG_CONTEXT>`; None: looked up in the folder's tokenizer files.
    """
    file = folder / "config.json"
    if not is_file(file):
        raise CheckpointError(
            f"folder: got {brief(str(folder))} without a config.json, expected an InternVL2 checkpoint"
        )
    try:
        return _config(read_object(file), folder, image_token_id)
    except CheckpointError:
        raise
    except MALFORMED as error:
        raise CheckpointError(
            f"{file}: expected the configuration of an InternVL2 checkpoint ({type(error).__name__}: {reason(error)})"
        ) from None


def read_object(file: Path) -> dict:
    """The JSON object in a file. Raises CheckpointError if there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected JSON ({reason(error)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: got {brief(data)}, expected a JSON object")
    return data


def _config(data: dict, folder: Path, image_token_id: int | None) -> InternVLConfig:
    if data.get("model_type") != "internvl_chat":
        raise CheckpointError(f"config.json: got model_type {brief(data.get('model_type'))}, expected 'internvl_chat'")
    if data.get("ps_version", "v1") != "v2":
        raise CheckpointError(f"config.json: got ps_version {brief(data.get('ps_version'))}, expected 'v2'")
    vision = data["vision_config"]
    _check_layers("vision_config", vision)
    text = _text_config(data["llm_config"])
    ratio = data["downsample_ratio"]
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            **{field: vision[field] for field in _VISION_FIELDS if field in vision},
            attention_bias=vision["qkv_bias"],
            use_qk_norm=vision["qk_normalization"],
            use_mean_pooling=True,  # False would add a norm after the last layer
        ),
        text_config=text,
        image_token_id=_image_token_id(folder) if image_token_id is None else image_token_id,
        image_seq_length=int((vision["image_size"] // vision["patch_size"] * ratio) ** 2),
        downsample_ratio=ratio,
        vision_feature_layer=data["select_layer"],
        tie_word_embeddings=False,  # the default would tie the head silently
    )


def _check_layers(part: str, data: dict) -> None:
    layers = data["num_hidden_layers"]
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise CheckpointError(f"config.json: {part}: got {brief(layers)} layers, expected 1 to {MOST_LAYERS}")


def _text_config(data: dict):
    architecture = (data.get("architectures") or ["none"])[0]
    if not isinstance(architecture, str) or architecture not in _TEXT_CONFIGS:
        raise CheckpointError(f"llm_config: got {brief(architecture)}, expected one of {', '.join(_TEXT_CONFIGS)}")
    _check_layers("llm_config", data)
    fields = {field: data[field] for field in _TEXT_FIELDS if field in data}
    limit = data["max_position_embeddings"]
    if architecture == "InternLM2ForCausalLM":
        fields["attention_bias"] = data.get("bias", False)
    window = data.get("sliding_window") if data.get("use_sliding_window", True) else None
    if window is not None and window < limit:
        raise CheckpointError(f"llm_config: got sliding_window {window}, expected none, or at least {limit} positions")
    rope = {"rope_type": "default", "rope_theta": data["rope_theta"]}
    scaling = dict(data.get("rope_scaling") or {})
    if scaling:
        kind = scaling.pop("type", None) or scaling.pop("rope_type")
        rope |= scaling | {"rope_type": "longrope" if kind == "su" else kind}
        if "original_max_position_embeddings" in data:
            # a default of the configuration would take the place of one that stands in rope_parameters alone
            original = {"original_max_position_embeddings": data["original_max_position_embeddings"]}
            rope, fields = rope | original, fields | original
    return _TEXT_CONFIGS[architecture](**fields, rope_parameters=rope, tie_word_embeddings=False)


def _image_token_id(folder: Path) -> int:
    added, decoder = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if added.is_file():
        names = read_object(added)
    elif decoder.is_file():
        entries = read_object(decoder).get("added_tokens_decoder", {})
        names = {entry["content"]: int(index) for index, entry in entries.items()}
    else:
        names = {}
    if type(names.get(IMAGE_TOKEN)) is not int:
        raise CheckpointError(
            f"image_token_id: got None and no {IMAGE_TOKEN} in {folder}'s added_tokens.json or tokenizer_config.json, "
            "expected the id of the image context token"
        )
    return names[IMAGE_TOKEN]


def translate(name: str, tensor: torch.Tensor, config: InternVLConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in transformers of one tensor of the checkpoint. Raises CheckpointError if it is not known."""
    for pattern, replacement in _RENAMES:
        if pattern.match(name):
            renamed = pattern.sub(replacement, name, count=1)
            break
    else:
        raise CheckpointError(f"{name}: got a tensor of this name, expected those of InternVL2")
    match = _LAYER.fullmatch(renamed)
    if match is None:
        yield renamed, tensor
        return
    layer, rest = match["layers"], match["rest"]
    kind = rest.rpartition(".")[2]
    if rest.startswith("attn.qkv."):
        for part, rows in zip("qkv", tensor.chunk(3)):
            yield f"{layer}attention.{part}_proj.{kind}", rows
    elif rest.startswith("attention.wqkv."):
        for part, rows in zip("qkv", _split_by_group(tensor, config.text_config)):
            yield f"{layer}self_attn.{part}_proj.{kind}", rows
    else:
        renames = _VISION_LAYER if "vision_tower" in layer else _INTERNLM2_LAYER
        old = next((old for old in renames if rest.startswith(old)), "")
        yield layer + renames.get(old, "") + rest[len(old) :], tensor


def _split_by_group(tensor: torch.Tensor, text) -> tuple[torch.Tensor, ...]:
    """Rows of InternLM2's matrix: for each KV head its query heads, its key, its value."""
    groups = text.num_attention_heads // text.num_key_value_heads
    by_kv_head = rearrange(tensor, "(kv part dim) ... -> kv part dim ...", kv=text.num_key_value_heads, part=groups + 2)
    parts = by_kv_head.split([groups, 1, 1], dim=1)
    return tuple(rearrange(part, "kv part dim ... -> (kv part dim) ...") for part in parts)
