"""LLaVA checkpoints with random weights, of any width, that vLLM and transformers both load: for tests and timings."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
)

from .tiny.files import write_checkpoint
from .tiny.model_llava import CHAT_TEMPLATE, published_name
from .tiny.words import BOS, EOS, IMAGE, PAD, WORDS, tokenizer

LAYERS, PATCH = 8, 8
TEXT = {
    "llama": (LlamaConfig, dict(num_key_value_heads=4, head_dim=32)),
    "mistral": (MistralConfig, dict(num_key_value_heads=2, head_dim=32, sliding_window=None)),
    "qwen2": (Qwen2Config, dict(num_key_value_heads=2)),
}


def random_llava(folder: Path, text: str = "llama", side: int = 64, seed: int = 0, **sizes) -> Path:
    """Write a LLaVA with `(side / 8) ** 2` visual tokens an image, 64 by default, unless `folder` has one.

    text: the text model. side: of the images, in pixels. sizes: fields of the text model's config.
    """
    if (folder / "config.json").exists():
        return folder
    kind, own = TEXT[text]
    shape = dict(
        vocab_size=len(WORDS), hidden_size=256, intermediate_size=352, num_hidden_layers=LAYERS, num_attention_heads=8,
        max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        image_size=side, patch_size=PATCH, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=64, hidden_act="quick_gelu",
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=kind(**shape | own | sizes), image_token_index=IMAGE,
        image_seq_length=(side // PATCH) ** 2, vision_feature_layer=-1, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", tie_word_embeddings=True, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    width = config.text_config.hidden_size
    for name, tensor in model.named_parameters():
        noise = torch.randn_like(tensor)
        if "norm" in name and name.endswith("weight"):
            tensor.data = 1 + 0.2 * noise
        else:
            tensor.data = noise * (0.1 if tensor.ndim == 1 else 1.5 * tensor.shape[-1] ** -0.5)
    embedding = model.model.language_model.embed_tokens.weight.data
    embedding *= 3 * width**-0.5
    embedding[IMAGE] = 0  # as good as never generated: transformers takes any such token for a part of an image
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(WORDS, {"image_token": "<image>"}), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    write_checkpoint(folder, model, config, processor, published_name)
    return folder
