"""The small InternVL: its shape, its first weights, its files, and what training and questions need to know of it."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
)

from vis_sparse.eval.tiny import model_llava, words
from vis_sparse.eval.tiny.data import IMAGE_SIZE
from vis_sparse.eval.tiny.files import write_checkpoint
from vis_sparse.eval.tiny.places import raster, tiles
from vis_sparse.eval.tiny.warm_start import llava
from vis_sparse.eval.tiny.words import BOS, IMAGE, WORD_IDS, chat_template, tokenizer

NAME, TITLE = "internvl", "InternVL"
MODEL = InternVLForConditionalGeneration
SIZES = ((96, 96), (96, 192), (192, 96), (192, 192))  # 1, 2, 2 and 4 tiles
SPECIAL = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
           "video_token": "<video>"}
WORDS = words.extended(SPECIAL)
IMAGE_START, IMAGE_END = (WORDS.index(word) for word in ("<img>", "</img>"))
BEFORE, AFTER = (BOS, WORD_IDS["user:"], IMAGE_START), (IMAGE_END,)  # tokens around an image
SHUFFLE = 2  # patches a side that become a visual token
PATCH = model_llava.PATCH * SHUFFLE
TILE = IMAGE_SIZE // PATCH  # visual tokens a side
MAX_TILES = 4
# Typical standard deviations of a patch's numbers in the LLaVA, before and after the layers of its tower.
FIRST_STD, LAST_STD = 1.8, 3.5
CHAT_TEMPLATE = chat_template("<IMG_CONTEXT>")


def prompt(question: str) -> str:
    """The text a question is put as, the same as the chat template's."""
    return f"USER: <IMG_CONTEXT>\n{question} ASSISTANT:"


def config() -> InternVLConfig:
    """Tiles of 96x96 pixels as 36 visual tokens; tower 4 layers x 128 and decoder 8 layers x 128 as in the LLaVA."""
    clip, text = model_llava.config().vision_config, model_llava.config().text_config
    text.vocab_size = len(WORDS)
    vision = InternVLVisionConfig(
        image_size=[IMAGE_SIZE] * 2, patch_size=[clip.patch_size] * 2, hidden_size=clip.hidden_size,
        intermediate_size=clip.intermediate_size, num_hidden_layers=clip.num_hidden_layers,
        num_attention_heads=clip.num_attention_heads, attention_bias=True, hidden_act=clip.hidden_act,
        layer_norm_eps=clip.layer_norm_eps, layer_scale_init_value=1.0,
    )
    return InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=TILE**2,
        downsample_ratio=1 / SHUFFLE, tie_word_embeddings=True,
    )


def processor() -> InternVLProcessor:
    """Images as 1 to 4 tiles and, beside more than one, a thumbnail; one token a word, padding on the left."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=MAX_TILES),
        video_processor=InternVLVideoProcessor(size=size), tokenizer=tokenizer(WORDS, SPECIAL),
        image_seq_length=TILE**2, chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def new_model(seed: int = 0) -> InternVLForConditionalGeneration:
    """The shipped LLaVA's weights where they fit, fp32: all of the decoder, most of the tower."""
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config())
    old, new = llava().model, model.model
    text = old.language_model.state_dict()
    new.language_model.embed_tokens.weight[: len(words.WORDS)] = text.pop("embed_tokens.weight")
    new.language_model.load_state_dict(text, strict=False)
    _start_tower(old.vision_tower, new.vision_tower)
    _start_projector(old.multi_modal_projector, new.multi_modal_projector)
    return model


def _start_tower(old, new) -> None:
    # The LLaVA's tower has a norm before its layers: what it scales by goes into what is summed there.
    norm, patches = old.pre_layrnorm, new.embeddings.patch_embeddings.projection
    scale = norm.weight / FIRST_STD
    patches.weight[:] = old.embeddings.patch_embedding.weight * scale.view(-1, 1, 1, 1)
    patches.bias[:] = norm.bias
    new.embeddings.cls_token[:] = old.embeddings.class_embedding * scale
    new.embeddings.position_embeddings[:] = old.embeddings.position_embedding.weight * scale
    for start, layer in zip(old.encoder.layers, new.encoder.layer, strict=True):
        layer.mlp.load_state_dict(start.mlp.state_dict())
        layer.layernorm_before.load_state_dict(start.layer_norm1.state_dict())
        layer.layernorm_after.load_state_dict(start.layer_norm2.state_dict())
        attention = start.self_attn.state_dict()
        renamed = {name.replace("out_proj", "projection_layer"): tensor for name, tensor in attention.items()}
        layer.attention.load_state_dict(renamed)


def _start_projector(old, new) -> None:
    # of the mean of the patches that become one token, which this projector gives the standard deviation 1
    new.linear_1.weight[:] = old.linear_1.weight.repeat(1, SHUFFLE**2) * (LAST_STD / SHUFFLE**2)
    new.linear_1.bias[:] = old.linear_1.bias
    new.linear_2.load_state_dict(old.linear_2.state_dict())


@cache
def _image_processor() -> GotOcr2ImageProcessor:
    return processor().image_processor


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images (RGB, one size) prepared as the processor does: (B, tiles, 3, 96, 96) fp32."""
    prepared = _image_processor()(images=list(images), return_tensors="pt")["pixel_values"]
    return rearrange(prepared, "(batch tile) ... -> batch tile ...", batch=len(images))


def visual_tokens(model: InternVLForConditionalGeneration, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Visual tokens of the tiles, and of the thumbnail if there is one, (B, tokens, 128)."""
    core = model.model
    all_tiles = rearrange(pixels, "batch tile ... -> (batch tile) ...")
    patches = core.vision_tower.encoder(core.vision_tower.embeddings(all_tiles)).last_hidden_state[:, 1:]
    patches = rearrange(patches, "tile (y x) width -> tile y x width", y=TILE * SHUFFLE)
    squares = core.pixel_shuffle(patches, 1 / SHUFFLE)
    tokens = rearrange(squares, "(batch tile) y x width -> batch (tile y x) width", batch=len(pixels))
    return core.multi_modal_projector(tokens)


def places(grid: tuple[int, int]) -> Tensor:
    """Where the middle of every visual token lies in an image of `grid` tokens in tiles: see `places.raster`."""
    cut = tiles(grid, TILE)
    return cut if len(cut) == TILE**2 else torch.cat([cut, raster((TILE, TILE))])


def positions(grid: tuple[int, int]) -> Tensor:
    """Position ids up to the end of the image, (1, tokens) int64."""
    return torch.arange(len(BEFORE) + len(places(grid)) + len(AFTER))[None]


def save(model: InternVLForConditionalGeneration, folder: Path) -> None:
    """Write config, processor, generation config and fp16 weights under the names of the published InternVL3 files."""
    write_checkpoint(folder, model, config(), processor(), _published_name)


def _published_name(name: str) -> str:
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
