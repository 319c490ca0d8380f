"""Reading the decoder of a transformers text model: plain pre-norm decoders.

Llama, Mistral, Qwen2, Qwen3 and Phi-3 attention with their gated FFN need nothing of their own; what does not fit is
refused by name.
"""

from __future__ import annotations

import torch
from torch import nn

from ..executor.decoder import Decoder, DecoderLayer
from ..executor.weights import listens
from .errors import PatchError
from .wraps import check_layers

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

    A sliding window is full attention as long as it is not full, which calls check. Raises PatchError if the layers
    have another structure or drop attention weights.
    """
    config, name = text_model.config, type(text_model).__name__
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise PatchError(f"{name}: got attention {', '.join(sorted(kinds))}, expected full attention in every layer")
    if getattr(config, "attention_dropout", 0.0):
        raise PatchError(f"{name}: got attention_dropout={config.attention_dropout}, expected 0")
    for place in ("resid_pdrop", "embd_pdrop"):
        if getattr(config, place, 0.0):
            raise PatchError(f"{name}: got {place}={getattr(config, place)}, expected 0")
    layers, norm, rotary = (_part(text_model, part, name) for part in ("layers", "norm", "rotary_emb"))
    for layer in layers:
        for part in ("self_attn", "mlp"):
            _part(layer, part, name)
    if len(layers) != config.num_hidden_layers:
        raise PatchError(f"{name}: got {len(layers)} layers, expected the {config.num_hidden_layers} of its config")
    check_layers(layers)
    for layer in layers:
        _known(layer, [_LAYER], name)
    heads, ffn_size = (_size(config, size, name) for size in ("num_attention_heads", "intermediate_size"))
    kv_heads = _size(config, "num_key_value_heads", name, heads)
    head_dim = _size(config, "head_dim", name, _size(config, "hidden_size", name) // heads)
    sizes = {"query": heads * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim}
    sizes |= {"gate": ffn_size, "up": ffn_size}
    known: dict[tuple, str | None] = {}
    read = tuple(_read_layer(layer, name, sizes, head_dim, known) for layer in layers)
    return Decoder(read, norm, rotary, heads, kv_heads, head_dim, ffn_size)


def _part(owner: nn.Module, part: str, name: str) -> nn.Module:
    module = getattr(owner, part, None)
    if not isinstance(module, nn.Module):
        raise PatchError(
            f"{name}: got a {type(owner).__name__} without {part}, expected a pre-norm decoder like Llama's"
        )
    return module


def _size(config, size: str, name: str, default: int | None = None) -> int:
    """A setting that holds for all layers. default: what it is where a config has none."""
    try:
        value = getattr(config, size, None)
    except RuntimeError:  # transformers' configs with other sizes in some layers
        value = "several"
    value = default if value is None else value
    if not isinstance(value, int):
        given = "no" if value is None else f"{value} values of"
        raise PatchError(f"{name}: got {given} {size} in its config, expected one number for all layers")
    return value


def _read_layer(
    layer: nn.Module, name: str, sizes: dict[str, int], head_dim: int, known: dict[tuple, str | None]
) -> DecoderLayer:
    """known: by their settings, the epsilons of norms that were tried before."""
    attention, ffn = layer.self_attn, layer.mlp
    norms = _NORMS if hasattr(attention, "q_norm") else {}
    places = [
        (layer, _LAYER),
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
    scale = getattr(attention, "scaling", None)
    if not isinstance(scale, float):
        raise PatchError(f"{name}: got a {type(attention).__name__} with scaling={scale!r}, expected a number")
    norms = {}
    for part in (part for part in parts if part.endswith("_norm")):
        owner, place = parts[part]
        module = getattr(owner, place)
        settings = (type(module), *(item for item in vars(module).items() if isinstance(item[1], int | float | str)))
        if settings not in known:
            known[settings] = _rms_epsilon(module)
        if known[settings] is not None:
            norms[part] = type(module), known[settings]
    return DecoderLayer(parts, scale, fused, norms)


@torch.no_grad()
def _rms_epsilon(norm: nn.Module) -> str | None:
    """The name of the epsilon of a norm that computes what `torch.rms_norm` does, tried on two rows; None of others."""
    weight = norm._parameters.get("weight")
    eps = next((name for name in ("variance_epsilon", "eps") if isinstance(vars(norm).get(name), float)), None)
    if weight is None or weight.is_meta or weight.dim() != 1 or eps is None or listens(vars(norm)):
        return None
    with torch.inference_mode(False):
        rows = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
        given, expected = norm(rows), torch.rms_norm(rows, weight.shape, weight, vars(norm)[eps])
    # of fp16 and bf16, a norm may round before it multiplies by its weight; of float64, it may compute in fp32
    limit = 4 * torch.finfo(rows.dtype).eps
    close = given.dtype == expected.dtype and torch.allclose(given, expected, rtol=limit, atol=0)
    return eps if close else None


def _known(module: nn.Module, structures, name: str) -> dict[str, tuple[str, ...]]:
    """The structure that `module` has: all of its places, and no other child with state, be it buffers alone."""
    children = {place for place, child in module.named_children() if child.state_dict()} - {"self_attn", "mlp"}
    for structure in structures:
        weightless = {place for place in structure if place.startswith("act")}
        if children == structure.keys() - weightless and all(hasattr(module, place) for place in weightless):
            return structure
    known = " or ".join(", ".join(structure) for structure in structures)
    given = ", ".join(sorted(children)) or "no weights in its modules"
    raise PatchError(f"{name}: got a {type(module).__name__} with {given}, expected {known}")
