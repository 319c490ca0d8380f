"""The small Qwen2-VL: its shape, its first weights, its files, and what training and questions need to know of it."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vis_sparse.eval.tiny import words
from vis_sparse.eval.tiny.files import write_checkpoint
from vis_sparse.eval.tiny.places import raster
from vis_sparse.eval.tiny.warm_start import start_from_llava
from vis_sparse.eval.tiny.words import BOS, EOS, IMAGE, PAD, WORD_IDS, chat_template, tokenizer

NAME, TITLE = "qwen2_vl", "Qwen2-VL"
MODEL = Qwen2VLForConditionalGeneration
SIZES = ((80, 80), (72, 112), (120, 80), (96, 112))
SPECIAL = {"image_token": "<|image_pad|>", "vision_start_token": "<|vision_start|>",
           "vision_end_token": "<|vision_end|>", "video_token": "<|video_pad|>"}
WORDS = words.extended(SPECIAL)
VISION_START, VISION_END, VIDEO = range(len(words.WORDS), len(WORDS))
BEFORE, AFTER = (BOS, WORD_IDS["user:"], VISION_START), (VISION_END,)  # tokens around an image
MERGE, TEMPORAL = 2, 2
PATCH = 8  # of a visual token: 2 x 2 patches of 4
CHAT_TEMPLATE = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
places = raster  # one grid an image


def prompt(question: str) -> str:
    """The text a question is put as, the same as the chat template's."""
    return f"USER: <|vision_start|><|image_pad|><|vision_end|>\n{question} ASSISTANT:"


def config() -> Qwen2VLConfig:
    """8 x 8 pixels a visual token; tower 3 layers x 96, decoder 8 layers x 256, 8 query and 4 KV heads of 32."""
    vision = {
        "depth": 3, "embed_dim": 96, "hidden_size": 256, "num_heads": 4, "mlp_ratio": 4, "patch_size": PATCH // MERGE,
        "spatial_merge_size": MERGE, "temporal_patch_size": TEMPORAL,
    }
    text = {
        "vocab_size": len(WORDS), "hidden_size": 256, "intermediate_size": 224, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
        "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": True,
        # the LLaVA's rotations, shared out to time, rows and columns in the published model's proportions
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    return Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=True,
    )


def processor() -> Qwen2VLProcessor:
    """Images of any size as 16 to 200 visual tokens, one token a word, padding on the left, and the chat template."""
    pixels = {"shortest_edge": 16 * PATCH**2, "longest_edge": 200 * PATCH**2}  # of a whole image
    cut = {"patch_size": PATCH // MERGE, "merge_size": MERGE, "temporal_patch_size": TEMPORAL, "size": pixels}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**cut), video_processor=Qwen2VLVideoProcessor(**cut),
        tokenizer=tokenizer(WORDS, SPECIAL), chat_template=CHAT_TEMPLATE,
    )


def new_model(seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """An untrained vision tower before the shipped LLaVA's language model, fp32."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config())
    start_from_llava(model)
    _start_tower(model.model.visual)
    return model


@torch.no_grad()
def _start_tower(tower) -> None:
    """First weights that keep their input's size, and heads that look along rows, along columns, and at neighbours.

    Patches are told apart by relative rotations only, so a head gets there by equal biases of queries and keys in the
    numbers that turn fastest with the row, the column, or both.
    """
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
    tower.merger.mlp[-1].weight *= 5  # the size of the LLaVA's visual tokens
    for block in tower.blocks:
        rows, columns = ([first, first + 1] for first in (0, block.attn.head_dim // 4))
        query, key, _ = block.attn.qkv.bias.view(3, block.attn.num_heads, -1)
        for head, turning in enumerate((rows, columns, rows + columns, rows + columns)):
            query[head, turning] = key[head, turning] = 4


@cache
def _image_processor() -> Qwen2VLImageProcessor:
    return processor().image_processor


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images (RGB, one size) prepared as the processor does: (B, patches, values) fp32."""
    patches = _image_processor()(images=list(images), return_tensors="pt")["pixel_values"]
    return rearrange(patches, "(batch patch) value -> batch patch value", batch=len(images))


def visual_tokens(model: Qwen2VLForConditionalGeneration, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Merged patches, (B, height * width, 256): the tower over images of one size at once."""
    visual = model.model.visual
    hidden = F.linear(pixels, visual.patch_embed.proj.weight.flatten(1))
    turn = _patch_rotation(grid, visual.blocks[0].attn.head_dim)
    for block in visual.blocks:
        parts = block.attn.qkv(block.norm1(hidden))
        by_head = "batch patch (part head dim) -> part batch head patch dim"
        query, key, value = rearrange(parts, by_head, part=3, head=block.attn.num_heads)
        query, key = _turned(query, turn), _turned(key, turn)
        weights = (query @ key.transpose(-1, -2) * block.attn.scaling).float().softmax(-1).to(value.dtype)
        hidden = hidden + block.attn.proj(rearrange(weights @ value, "batch head patch dim -> batch patch (head dim)"))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden).view(len(pixels), grid[0] * grid[1], -1)


def _patch_rotation(grid: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every patch's angles, (patches, head_dim), patches in the processor's order."""
    places = torch.arange(MERGE)
    rows = (torch.arange(grid[0]) * MERGE).view(-1, 1, 1, 1) + places.view(-1, 1)
    columns = (torch.arange(grid[1]) * MERGE).view(-1, 1, 1) + places
    frequencies = 1e4 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    both = torch.broadcast_tensors(rows, columns)
    angles = torch.cat([axis.reshape(-1, 1) * frequencies for axis in both], dim=1).repeat(1, 2)
    return angles.cos(), angles.sin()


def _turned(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    first, second = heads.float().chunk(2, dim=-1)
    return (heads * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)


def positions(grid: tuple[int, int]) -> Tensor:
    """Position ids (time, row, column) up to the end of the image, (3, 1, tokens) int64."""
    start = len(BEFORE)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    image = start + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1)
    end = start + max(grid) + torch.arange(len(AFTER))
    return torch.cat([torch.arange(start).expand(3, -1), image, end.expand(3, -1)], dim=1)[:, None]


def save(model: Qwen2VLForConditionalGeneration, folder: Path) -> None:
    """Write config, processor, generation config and fp16 weights under the names of the published Qwen2-VL files."""
    write_checkpoint(folder, model, config(), processor(), _published_name)


def _published_name(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
