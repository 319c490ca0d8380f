"""Models and inputs for the benchmark: a shape's decoder at full width, with random weights and random embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config
from transformers.initialization import no_init_weights

from ..calibration.samples import with_answer
from ..cost.shapes import ModelShape
from ..layout.layout import VisualLayout

TEXT_BEFORE = 35  # tokens of LLaVA-1.5's prompt before the image
VOCABULARY = 8  # embeddings and LM head take no part in the timed work, and would only take memory
WEIGHT_RANGE = 0.035  # uniform, with the standard deviation (0.02) that the models start their training with


def random_model(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, side: int = 2
) -> LlavaForConditionalGeneration:
    """`LlavaForConditionalGeneration` with the decoder of `shape`, and a vision tower that is only there to load: its
    images become grids of side x side tokens.

    The text model is transformers' Llama, or Qwen2 where the shape has biases on Q, K and V.
    """
    text = (Qwen2Config if shape.qkv_bias else LlamaConfig)(
        **decoder_sizes(shape),
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 20,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=14 * side,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=1, image_seq_length=side**2)
    config.dtype = dtype
    with device, no_init_weights():
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    fill_randomly(model, torch.Generator(device).manual_seed(0))
    return model


def decoder_sizes(shape: ModelShape) -> dict[str, int]:
    """The sizes of a decoder of `shape` by their names in transformers' text configs; `VOCABULARY` words."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
    }


@torch.no_grad()
def fill_randomly(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Uniform weights, and norms of 1."""
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            weight.fill_(1)
        else:
            weight.uniform_(-WEIGHT_RANGE, WEIGHT_RANGE, generator=generator)


def image_layout(shape: ModelShape, batch: int, text_tokens: int, image_size: tuple[int, int] | None) -> VisualLayout:
    """The layout of `batch` samples with one image of `image_size` (height, width) pixels amid `text_tokens` of text.

    The image stands after LLaVA-1.5's 35 prompt tokens, and at least one text token follows it.
    """
    start, segments = min(TEXT_BEFORE, text_tokens - 1), []
    for grid in shape.image.encode(*(image_size or shape.image.default_size)).grids:
        segments.append((start, grid))
        start += grid[0] * grid[1] * grid[2]
    return VisualLayout.from_grids([segments] * batch)


def random_embeddings(shape: ModelShape, layout: VisualLayout, text_tokens: int, dtype, device) -> Tensor:
    """Input embeddings of a whole prompt, (batch, visual + text tokens of a sample, hidden), standard normal."""
    length = layout.num_visual // layout.batch_size + text_tokens
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(layout.batch_size, length, shape.hidden, generator=generator, device=device, dtype=dtype)


def image_samples(model, shape: ModelShape, number: int, text_tokens: int, answer: int) -> list[dict]:
    """Samples for `calibrate` on a `random_model`: random text around as many visual tokens as the shape's usual image
    has, here of many small images.

    text_tokens: all of a sample's text, of which the last `answer` are the answer.
    """
    size, generator = model.config.vision_config.image_size, torch.Generator().manual_seed(2)
    image, held = model.config.image_token_index, model.config.image_seq_length
    visual = image_layout(shape, 1, text_tokens, None).num_visual

    def text(tokens: int) -> Tensor:
        return torch.randint(image + 1, VOCABULARY, (tokens,), generator=generator)

    def sample() -> dict:
        before, after = TEXT_BEFORE, text_tokens - TEXT_BEFORE - answer
        ids = torch.cat([text(before), torch.full((visual // held * held,), image), text(after)])[None]
        pixels = torch.randn(visual // held, 3, size, size, generator=generator).to(model.dtype)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        return with_answer(inputs, text(answer))

    return [sample() for _ in range(number)]
