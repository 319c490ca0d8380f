"""Every text model type of the installed transformers, small, inside a LLaVA."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

# All that a causal LM is made of, and the text halves of multimodal models.
TYPES = tuple(
    sorted(kind for kind in MODEL_MAPPING_NAMES if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind.endswith("_text"))
)

WIDTH, LAYERS, HEADS, KV_HEADS, NEURONS, VOCAB = 64, 4, 4, 2, 96, 100
IMAGE_TOKEN = 95
# What sizes are called. A config is given those that it has.
_SIZES = (
    dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_size", "embedding_dim", "attention_hidden_size"), WIDTH
    )
    | dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS
    )
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS)
    | dict.fromkeys(("encoder_attention_heads", "attention_heads", "swa_num_attention_heads"), HEADS)
    | dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), KV_HEADS)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), NEURONS)
    | dict.fromkeys(("ffn_hidden_size", "dim_ff", "dff", "intermediate_size_mlp", "expert_ffn_hidden_size"), NEURONS)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size"), 32)
    | dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 32)
    | dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2)
    | dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1)
    | dict.fromkeys(("head_dim", "swa_head_dim", "qk_head_dim", "v_head_dim", "kv_channels"), WIDTH // HEADS)
    | dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim", "rotary_dim"), WIDTH // HEADS // 2)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank", "hidden_size_per_layer_input"), 16)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head"), 16)
    | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), HEADS)
    | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCAB)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256)
    | dict(query_pre_attn_scalar=WIDTH // HEADS, mamba_n_heads=8, index_n_heads=HEADS, index_topk=8, sliding_window=64)
    | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
)
_SECTIONS = dict(rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 3, 3]))
_OF_TYPE = {
    "cosmos3_edge_text": _SECTIONS,
    "dots1": dict(n_shared_experts=1),
    "dots3_note_text": dict(num_key_value_heads=HEADS),
    "falcon_h1": dict(mamba_d_ssm=128),
    "glm5_next_text": dict(num_key_value_heads=HEADS),
    "mamba2": dict(num_heads=2 * HEADS),
    "qwen2_vl_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "zaya": dict(num_experts_per_tok=1),
}
_MOST_PARAMETERS = 3_000_000


class NotBuilt(Exception):
    """Why there is no small model of a type."""


class NoTextModel(NotBuilt):
    """Why transformers' LLaVA cannot have a text model of a type, of any size."""


def text_config(kind: str, **settings) -> hf.PreTrainedConfig:
    """A config of model type `kind` with small sizes. Raises NotBuilt."""
    config_class = hf.CONFIG_MAPPING[kind]
    try:
        there = config_class().to_dict()
        if any(isinstance(there.get(part), dict) for part in ("text_config", "decoder", "decoder_config")):
            raise NoTextModel("has a text model inside, of a type of its own")
        sizes = {name: size for name, size in _SIZES.items() if name in there}
        config = config_class(**sizes | _OF_TYPE.get(kind, {}) | settings)
        if not hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False  # said by the configs around it
        return config
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"config: {_line(error)}") from error


def llava(config: hf.PreTrainedConfig, dtype=torch.float32) -> hf.LlavaForConditionalGeneration:
    """A LLaVA around a text model with this config, random weights of a spread that shows what differs."""
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    try:
        whole = hf.LlavaConfig(vision_config=vision, text_config=config, image_token_id=IMAGE_TOKEN)
        whole.pad_token_id = 0
        with torch.device("meta"):
            size = sum(p.numel() for p in hf.LlavaForConditionalGeneration(whole).parameters())
        if size > _MOST_PARAMETERS:
            raise NotBuilt(f"{size} parameters with the sizes known here")
        model = hf.LlavaForConditionalGeneration(whole).eval().to(dtype)
    except NotBuilt:
        raise
    except Exception as error:
        kind = NoTextModel if "no attribute `embed_tokens`" in str(error) else NotBuilt
        raise kind(f"model: {_line(error)}") from error
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = (1 + 0.2 * noise if tensor.dim() == 1 and name.endswith("weight") else 0.12 * noise).to(dtype)
    return model


def odd_settings(kind: str) -> Iterator[dict]:
    """Settings under which a decoder of this type computes something else than by default: all scales and caps at once,
    and each switch alone."""
    base, odd = hf.PreTrainedConfig().to_dict(), {}
    for name, value in text_config(kind).to_dict().items():
        if name in base or any(
            word in name for word in ("drop", "eps", "init", "aux", "jitter", "token", "cache", "tie")
        ):
            continue
        if isinstance(value, bool):
            yield {name: not value}
        elif isinstance(value, float):
            odd[name] = 0.7 * value if value else 0.7
        elif value is None and any(word in name for word in ("cap", "scal", "mult")):
            odd[name] = 0.7
    if odd:
        yield odd


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
