"""Reading the decoder of a transformers text model: plain pre-norm decoders.

Llama, Mistral, Qwen2, Qwen3 and Phi-3 attention with their gated FFN need nothing of their own; what does not fit is
refused by name.
"""

from __future__ import annotations

from torch import nn

from ..executor.lanes import Decoder, DecoderLayer
from .errors import PatchError

# the linear layers (and activation) of an attention module and of an FFN in each known structure, and their parts
_ATTENTION = (
    {"q_proj": ("query",), "k_proj": ("key",), "v_proj": ("value",), "o_proj": ("output",)},
    {"qkv_proj": ("query", "key", "value"), "o_proj": ("output",)},
)
_FFN = (
    {"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",), "act_fn": ("activation",)},
    {"gate_up_proj": ("gate", "up"), "down_proj": ("down",), "activation_fn": ("activation",)},
)
_LAYER = {"input_layernorm": ("input_norm",), "post_attention_layernorm": ("post_norm",)}
_NORMS = {"q_norm": ("query_norm",), "k_norm": ("key_norm",)}


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
    if any(getattr(config, place, 0.0) for place in ("resid_pdrop", "embd_pdrop")):
        raise PatchError(f"{name}: got resid_pdrop={config.resid_pdrop}, embd_pdrop={config.embd_pdrop}, expected 0")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {"query": heads * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim}
    sizes |= {"gate": config.intermediate_size, "up": config.intermediate_size}
    layers = tuple(_read_layer(layer, name, sizes, head_dim) for layer in text_model.layers)
    rotary = text_model.rotary_emb
    return Decoder(layers, text_model.norm, rotary, heads, kv_heads, head_dim, config.intermediate_size)


def _read_layer(layer: nn.Module, name: str, sizes: dict[str, int], head_dim: int) -> DecoderLayer:
    attention, ffn = layer.self_attn, layer.mlp
    norms = _NORMS if hasattr(attention, "q_norm") else {}
    places = [
        (layer, _known(layer, [_LAYER], name)),
        (attention, _known(attention, [structure | norms for structure in _ATTENTION], name)),
        (ffn, _known(ffn, _FFN, name)),
    ]
    parts, fused = {}, {}
    for owner, structure in places:
        for place, owned in structure.items():
            parts |= {part: (owner, place) for part in owned}
            start = 0
            for part in owned if len(owned) > 1 else ():
                fused[part] = range(start, start + sizes[part])
                start += sizes[part]
    for place in norms:
        width = tuple(getattr(attention, place).weight.shape)
        if width != (head_dim,):
            raise PatchError(f"{name}: got a {place} of shape {width}, expected a norm of each head, ({head_dim},)")
    return DecoderLayer(parts, attention.scaling, fused)


def _known(module: nn.Module, structures, name: str) -> dict[str, tuple[str, ...]]:
    """The structure that `module` has: all of its places, and no other child with weights."""
    children = {place for place, child in module.named_children() if any(True for _ in child.parameters())}
    children -= {"self_attn", "mlp"}
    for structure in structures:
        weightless = {place for place in structure if place.startswith("act")}
        if children == structure.keys() - weightless and all(hasattr(module, place) for place in weightless):
            return structure
    known = " or ".join(", ".join(structure) for structure in structures)
    raise PatchError(f"{name}: got a {type(module).__name__} with {', '.join(sorted(children))}, expected {known}")
