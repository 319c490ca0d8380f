"""Reading the decoder of a transformers text model: plain pre-norm decoders with separate projections.

Llama, Mistral and Qwen2 attention and gated FFN need nothing of their own; what does not fit is refused by name.
"""

from __future__ import annotations

from torch import nn

from ..lanes import Decoder, DecoderLayer
from .errors import PatchError

_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_FFN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "activation": "act_fn"}


def read_decoder(text_model: nn.Module) -> Decoder:
    """The executor's view of `text_model` (LlamaModel, MistralModel, Qwen2Model, ...).

    Raises PatchError if its layers have another structure, slide their attention window or drop attention weights.
    """
    config, name = text_model.config, type(text_model).__name__
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise PatchError(
            f"{name}: got attention {', '.join(sorted(kinds))} with sliding_window="
            f"{getattr(config, 'sliding_window', None)}, expected full attention in every layer"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise PatchError(f"{name}: got attention_dropout={config.attention_dropout}, expected 0")
    layers = tuple(_read_layer(layer, name) for layer in text_model.layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Decoder(
        layers,
        text_model.norm,
        text_model.rotary_emb,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        config.intermediate_size,
    )


def _read_layer(layer: nn.Module, name: str) -> DecoderLayer:
    attention, ffn = layer.self_attn, layer.mlp
    missing = [place for place in _ATTENTION.values() if not hasattr(attention, place)]
    missing += [place for place in _FFN.values() if not hasattr(ffn, place)]
    extra = [place for place in ("q_norm", "k_norm") if hasattr(attention, place)]
    if missing or extra:
        found = f"without {', '.join(missing)}" if missing else f"with {', '.join(extra)}"
        expected = ", ".join([*_ATTENTION.values(), *_FFN.values()])
        raise PatchError(
            f"{name}: got a decoder layer {found}, expected exactly {expected} as in Llama, Mistral or Qwen2"
        )
    parts = {"input_norm": (layer, "input_layernorm"), "post_norm": (layer, "post_attention_layernorm")}
    parts |= {part: (attention, place) for part, place in _ATTENTION.items()}
    parts |= {part: (ffn, place) for part, place in _FFN.items()}
    return DecoderLayer(parts, attention.scaling)
