"""The small LLaVA: its shape, its first weights, its files, and what training and questions need to know of it."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vis_sparse.eval.tiny.data import IMAGE_SIZE
from vis_sparse.eval.tiny.files import write_checkpoint
from vis_sparse.eval.tiny.places import raster
from vis_sparse.eval.tiny.words import BOS, EOS, IMAGE, PAD, WORD_IDS, WORDS, chat_template, tokenizer

NAME, TITLE = "llava", "LLaVA"
MODEL = LlavaForConditionalGeneration
SIZES = ()  # images as they are drawn
BEFORE, AFTER = (BOS, WORD_IDS["user:"]), ()  # tokens around an image
PATCH = 8
GRID = IMAGE_SIZE // PATCH
places = raster  # one grid an image
CHAT_TEMPLATE = chat_template("<image>")


def prompt(question: str) -> str:
    """The text a question is put as, the same as the chat template's."""
    return f"USER: <image>\n{question} ASSISTANT:"


def config() -> LlavaConfig:
    """96x96 images as 144 visual tokens; CLIP 4 layers x 128, Llama 8 layers x 128, 8 heads of 32: 3.0 M parameters."""
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE, patch_size=PATCH, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, projection_dim=128, hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        # Slow rotations only in most of a head's dimensions: words must match over some hundred visual tokens.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=GRID * GRID,
        vision_feature_layer=-1, vision_feature_select_strategy="default", projector_hidden_act="gelu",
        tie_word_embeddings=True, pad_token_id=PAD,
    )


def processor() -> LlavaProcessor:
    """CLIP's image preparation at 96x96, one token a word (any case), padding on the left, and the chat template."""
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(WORDS, {"image_token": "<image>"}), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def new_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """An untrained model in fp32, with first weights that make places visible and equal words attend to each other."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config())
    vision, text = model.model.vision_tower, model.model.language_model
    # CLIP's own start (0.02) drowns the position in the patch's content.
    vision.embeddings.position_embedding.weight[1:] = 0.5 * _positions(GRID, 128)
    vision.embeddings.patch_embedding.weight.normal_(std=0.7 / math.sqrt(3 * PATCH * PATCH))
    text.embed_tokens.weight.normal_(std=128**-0.5)
    for layer in text.layers:
        attention = layer.self_attn
        # Half of the heads start with equal queries and keys, and an output that undoes the value (mimetic
        # initialisation, arXiv 2305.09828): a word attends to tokens that hold the same word, and copies them.
        attention.q_proj.weight.normal_(std=128**-0.5)
        attention.k_proj.weight.normal_(std=128**-0.5)
        attention.k_proj.weight[:128] = attention.q_proj.weight[:128]
        attention.o_proj.weight[:, :128] = attention.v_proj.weight[:128].T
    return model


def _positions(side: int, width: int) -> torch.Tensor:
    """Sine/cosine codes of a side x side grid: (side * side, width), values in -1..1."""
    frequencies = math.pi / side * torch.arange(1, width // 4 + 1) * 0.5
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line[:, None].expand(side, side, -1)
    columns = line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images (RGB, 96x96) prepared as the processor does: (B, 3, 96, 96) fp32."""
    values = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    values = rearrange(values, "batch y x channel -> batch channel y x")
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (values / 255 - mean) / std


def visual_tokens(model: LlavaForConditionalGeneration, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Projected patch embeddings, (B, 144, 128)."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
    return model.model.multi_modal_projector(hidden[:, 1:])


def positions(grid: tuple[int, int]) -> Tensor:
    """Position ids up to the end of the image, (1, tokens) int64."""
    return torch.arange(len(BEFORE) + grid[0] * grid[1])[None]


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write config, processor, generation config and fp16 weights under the names of the published LLaVA-1.5 files."""
    write_checkpoint(folder, model, config(), processor(), published_name)


def published_name(name: str) -> str:
    """What a tensor of the model is called in the published LLaVA-1.5 files."""
    name = name.removeprefix("model.")
    name = name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name
