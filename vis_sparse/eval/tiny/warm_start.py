"""The shipped LLaVA as a teacher of other small models, and its language model as the first weights of a Qwen2-VL's.

There the hidden state becomes twice as wide: the LLaVA's 128 numbers, then 128 that start at zero. Every two heads come
to share a KV head, and the FFN keeps its strongest neurons.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from vis_sparse.eval.tiny import checkpoint, model_llava

HEADS, HEAD_DIM, WIDTH = 8, 32, 128
# Of a head's rotation frequencies, the first few turn by more than a fraction of a radian over an image.
TURNING = 4


@cache
def llava() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint("llava"), dtype=torch.float32).eval()


@torch.no_grad()
def llava_tokens(images: Sequence[Image.Image], places: Tensor, width: int) -> Tensor:
    """The LLaVA's visual tokens of images (RGB, 96x96) at other places (tokens, 2), (y, x) as shares of the image, and
    in a state of `width` numbers: (B, tokens, width)."""
    side = model_llava.GRID
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model_llava.visual_tokens(llava(), model_llava.pixels(images), (side, side)).float()
    plane = rearrange(tokens, "batch (y x) width -> batch width y x", y=side)
    at = (2 * places.flip(1) - 1).expand(len(images), 1, -1, 2)
    found = F.grid_sample(plane, at, mode="bilinear", padding_mode="border", align_corners=False)
    return F.pad(rearrange(found, "batch width 1 token -> batch token width"), (0, width - WIDTH))


@torch.no_grad()
def start_from_llava(model) -> None:
    """Put the LLaVA's weights into the text model of `model` (a Qwen2-VL of width 256 with 8 query and 4 KV heads)."""
    old, new = llava().model.language_model, model.model.language_model
    new.embed_tokens.weight[:, WIDTH:] = 0
    new.embed_tokens.weight[: len(old.embed_tokens.weight), :WIDTH] = old.embed_tokens.weight
    _norm(old.norm, new.norm)
    for layer, start in zip(new.layers, old.layers, strict=True):
        _norm(start.input_layernorm, layer.input_layernorm)
        _norm(start.post_attention_layernorm, layer.post_attention_layernorm)
        _ffn(start.mlp, layer.mlp)
        _attention(start.self_attn, layer.self_attn)


def _norm(old, new) -> None:
    # The root mean square of twice as many numbers, half of them zero, is smaller by sqrt(2).
    new.weight[:WIDTH] = old.weight / math.sqrt(2)
    new.weight[WIDTH:] = old.weight.mean() / math.sqrt(2)


def _ffn(old, new) -> None:
    strength = old.gate_proj.weight.norm(dim=1) * old.up_proj.weight.norm(dim=1) * old.down_proj.weight.norm(dim=0)
    kept = strength.topk(len(new.gate_proj.weight)).indices.sort().values
    new.gate_proj.weight[:, :WIDTH] = old.gate_proj.weight[kept]
    new.up_proj.weight[:, :WIDTH] = old.up_proj.weight[kept]
    new.down_proj.weight[:] = 0
    new.down_proj.weight[:WIDTH] = old.down_proj.weight[:, kept]


def _attention(old, new) -> None:
    query, key, value = (
        rearrange(projection.weight, "(head dim) width -> head dim width", head=HEADS)
        for projection in (old.q_proj, old.k_proj, old.v_proj)
    )
    output = rearrange(old.o_proj.weight, "width (head dim) -> head dim width", head=HEADS)
    queries, outputs = torch.empty_like(query), torch.empty_like(output)
    keys, values = torch.empty(2, HEADS // 2, HEAD_DIM, WIDTH)
    for kv, pair in enumerate(_pairs(query, key)):
        both = slice(2 * kv, 2 * kv + 2)
        queries[both], keys[kv] = _shared_key(query[pair], key[pair])
        outputs[both], values[kv] = _shared(output[pair], value[pair])
    new.q_proj.weight[:, :WIDTH] = rearrange(queries, "head dim width -> (head dim) width")
    new.k_proj.weight[:, :WIDTH] = rearrange(keys, "head dim width -> (head dim) width")
    new.v_proj.weight[:, :WIDTH] = rearrange(values, "head dim width -> (head dim) width")
    new.o_proj.weight[:] = 0
    new.o_proj.weight[:WIDTH] = rearrange(outputs, "head dim width -> width (head dim)")


def _shared(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """One `right` (r, d) for two heads, and their `left`s (2, r, d) for it: the closest to each left.T @ right.

    By singular values of the two products on top of each other (Eckart-Young).
    """
    products = (left.transpose(-1, -2) @ right).flatten(0, 1)
    rank = right.shape[1]
    u, s, v = torch.linalg.svd(products, full_matrices=False)
    root = s[:rank].sqrt().to(products.dtype)
    return (u[:, :rank] * root).unflatten(0, (2, -1)).transpose(-1, -2), root[:, None] * v[:rank]


def _shared_key(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """`_shared` that rotary embeddings still fit: the turning frequencies one by one, as complex numbers."""
    queries, shared = torch.empty_like(query), torch.empty_like(key[0])
    half = HEAD_DIM // 2
    for i in range(TURNING):
        q, k = (torch.complex(rows[:, i], rows[:, i + half])[:, None] for rows in (query, key))
        q, k = _shared(q, k.conj())
        queries[:, i], queries[:, i + half] = q[:, 0].real, q[:, 0].imag
        shared[i], shared[i + half] = k[0].real, -k[0].imag
    queries[:, _steady()], shared[_steady()] = _shared(query[:, _steady()], key[:, _steady()])
    return queries, shared


def _steady() -> Tensor:
    """Indices in a head of the numbers that are hardly turned."""
    return torch.arange(HEAD_DIM).view(2, -1)[:, TURNING:].flatten()


def _pairs(query: Tensor, key: Tensor) -> list[list[int]]:
    """The heads in pairs, so that sharing a key costs least in all."""

    def lost(pair: tuple[int, int]) -> float:
        left, right = query[list(pair)][:, _steady()], key[list(pair)][:, _steady()]
        products = (left.transpose(-1, -2) @ right).flatten(0, 1)
        return torch.linalg.svdvals(products)[right.shape[1] :].square().sum().item()

    loss = {pair: lost(pair) for pair in combinations(range(HEADS), 2)}

    def best(heads: list[int]) -> tuple[float, list[list[int]]]:
        if not heads:
            return 0.0, []
        first, options = heads[0], []
        for other in heads[1:]:
            total, pairs = best([head for head in heads if head not in (first, other)])
            options.append((total + loss[first, other], [[first, other], *pairs]))
        return min(options)

    return best(list(range(HEADS)))[1]
