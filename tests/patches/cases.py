"""The families under test: a small model of the real classes, its real processor, and what pictures become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf

from .processors import IDS, VOCAB

LAYERS, HEADS, KV_HEADS, WIDTH, NEURONS = 3, 8, 2, 64, 48
TEXT = dict(
    hidden_size=WIDTH,
    intermediate_size=NEURONS,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    vocab_size=VOCAB,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
    tie_word_embeddings=False,
)
CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
VIP_LEVELS = dict.fromkeys(("vision_feature_layer", "vision_feature_layers"), [-1, 1])  # new and older transformers
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Visual:
    """A picture (width, height) or a video (frames, width, height), and the grids it becomes, in order."""

    size: tuple[int, ...]
    grids: tuple[Grid, ...]
    among_others: tuple[Grid, ...] | None = None  # where a sample with several pictures treats each another way


@dataclass(frozen=True)
class Case:
    """config() and model_class make the model; processor(tokenizer) its processor. placeholders: ids of visual tokens.

    image, video: what stands for one in a prompt.
    """

    name: str
    model_class: type
    config: Callable[[], hf.PreTrainedConfig]
    processor: Callable
    pictures: tuple[Visual, Visual]
    video: Visual | None = None
    image_text: str = "<image>"
    video_text: str = "<video>"
    placeholders: tuple[int, ...] = (IDS["<image>"], IDS["<video>"])

    def build(self, dtype: torch.dtype, seed: int = 0):
        """Random weights, wide enough spread that a misplaced key or neuron shows in the logits."""
        model = self.model_class(self.config()).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise
        # special tokens are as good as never generated
        model.lm_head.weight.data[: IDS["w0"]] = 0
        model.generation_config.eos_token_id = None
        return model.to(dtype)


def _llava_processor(words):
    size = {"height": 16, "width": 16}
    image = hf.CLIPImageProcessor(size=size, crop_size=size)
    return hf.LlavaProcessor(
        image, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _llava(model_class, config_class, **settings):
    def config():
        text = hf.LlamaConfig(**TEXT)
        made = config_class(vision_config=CLIP, text_config=text, image_token_id=IDS["<image>"], **settings)
        made.pad_token_id = 0
        return made

    fixed = ((1, 4, 4),)
    name = model_class.__name__.removesuffix("ForConditionalGeneration")
    return Case(name, model_class, config, _llava_processor, (Visual((30, 20), fixed), Visual((16, 40), fixed)))


def _qwen_vl(name, text: dict, vision: dict, video_grids, video_processor=hf.Qwen2VLVideoProcessor):
    """Patches of 4 x 4 pixels, merged 2 x 2; two frames a patch."""
    model_class, config_class = (getattr(hf, f"{name}{end}") for end in ("ForConditionalGeneration", "Config"))
    sizes = dict(patch_size=4, temporal_patch_size=2)

    def config():
        return config_class(
            text_config=TEXT | text,
            vision_config=dict(depth=2, num_heads=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
            | vision,
            image_token_id=IDS["<image>"],
            video_token_id=IDS["<video>"],
            vision_start_token_id=IDS["<|vision_start|>"],
            vision_end_token_id=IDS["<|vision_end|>"],
            tie_word_embeddings=False,
        )

    def processor(words):
        limits = dict(size={"shortest_edge": 64, "longest_edge": 4096}, merge_size=2)
        image = hf.Qwen2VLImageProcessor(**sizes, **limits)
        video = video_processor(**sizes, **limits, do_sample_frames=False)
        return getattr(hf, f"{name}Processor")(image, words, video)

    pictures = (Visual((24, 16), ((1, 2, 3),)), Visual((8, 32), ((1, 4, 1),)))
    video = Visual((4, 24, 16), video_grids)
    # as their chat templates write them: beams count images by the token before them
    texts = dict(
        image_text="<|vision_start|> <image> <|vision_end|>", video_text="<|vision_start|> <video> <|vision_end|>"
    )
    return Case(name.replace("_VL", "VL").replace("_", "."), model_class, config, processor, pictures, video, **texts)


def _anyres(name, vision: dict, processor, pictures, video_grids=(), **settings):
    """LLaVA-NeXT and its kin: tiles of 16 x 16 pixels, 4 x 4 tokens each."""
    model_class, config_class = (getattr(hf, f"{name}{end}") for end in ("ForConditionalGeneration", "Config"))

    def config():
        made = config_class(
            vision_config=CLIP | vision,
            text_config=hf.Qwen2Config(**TEXT),
            image_token_id=IDS["<image>"],
            video_token_id=IDS["<video>"],
            image_grid_pinpoints=PINPOINTS,
            tie_word_embeddings=False,
            **settings,
        )
        made.pad_token_id = 0
        return made

    video = Visual((3, 16, 16), tuple(video_grids)) if video_grids else None
    return Case(name, model_class, config, processor, pictures, video)


def _next_processor(words):
    return hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(**SQUARE, image_grid_pinpoints=PINPOINTS), words, **CLASS_TOKEN
    )


def _next_video_processor(words):
    return hf.LlavaNextVideoProcessor(
        image_processor=hf.LlavaNextImageProcessor(**SQUARE, image_grid_pinpoints=PINPOINTS),
        video_processor=hf.LlavaNextVideoVideoProcessor(**SQUARE),
        tokenizer=words,
        **CLASS_TOKEN,
    )


def _onevision_processor(words):
    return hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SIDES, image_grid_pinpoints=PINPOINTS),
        words,
        hf.LlavaOnevisionVideoProcessor(size=SIDES),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
    )


def _internvl(text: str, **settings):
    """Tiles of 16 x 16 pixels, 2 x 2 tokens each."""

    def config():
        made = hf.InternVLConfig(
            text_config=getattr(hf, f"{text}Config")(**TEXT | settings),
            vision_config=dict(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=(16, 16),
                patch_size=(4, 4),
            ),
            image_token_id=IDS["<IMG_CONTEXT>"],
            image_seq_length=4,
            tie_word_embeddings=False,
        )
        made.pad_token_id = 0
        return made

    def processor(words):
        image = hf.GotOcr2ImageProcessor(size=SIDES, crop_to_patches=True, max_patches=3)
        return hf.InternVLProcessor(image, words, hf.InternVLVideoProcessor(size=SIDES), image_seq_length=4)

    tile = (1, 2, 2)
    return Case(
        f"InternVL ({text})",
        hf.InternVLForConditionalGeneration,
        config,
        processor,
        # two and three tiles, and a thumbnail
        (Visual((30, 20), (tile,) * 3), Visual((16, 40), (tile,) * 4)),
        Visual((3, 16, 16), (tile,) * 3),
        image_text="<IMG_CONTEXT>",
        placeholders=(IDS["<IMG_CONTEXT>"],),
    )


ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[1, 1, 2]))
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
SIDES = {"height": 16, "width": 16}
SQUARE = dict(size={"shortest_edge": 16}, crop_size=SIDES)
CLASS_TOKEN = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
# 30 x 20 pixels fill the width of 2 x 2 tiles: one row of padding is cut off at the top and one at the bottom;
# 16 x 40 fill the height of two tiles, where half a column of padding stays
NEXT_PICTURES = (Visual((30, 20), ((1, 4, 4), (1, 6, 9))), Visual((16, 40), ((1, 4, 4), (1, 8, 5))))
# the same, scaled down to the area of one tile; pictures beside others are not tiled
BASE = ((1, 4, 4), (1, 1, 1))
SMALL_PICTURES = (
    Visual((30, 20), ((1, 4, 4), (1, 3, 5)), BASE),
    Visual((16, 40), ((1, 4, 4), (1, 5, 3)), BASE),
)

CASES = (
    _llava(hf.LlavaForConditionalGeneration, hf.LlavaConfig),
    _anyres("LlavaNext", {}, _next_processor, NEXT_PICTURES),
    _anyres("LlavaNextVideo", {}, _next_video_processor, NEXT_PICTURES, [(3, 2, 2)]),
    _anyres(
        "LlavaOnevision",
        dict(model_type="siglip_vision_model"),
        _onevision_processor,
        SMALL_PICTURES,
        [(3, 2, 2), (1, 1, 1)],
        vision_aspect_ratio="anyres_max_1",
    ),
    _llava(hf.VipLlavaForConditionalGeneration, hf.VipLlavaConfig, **VIP_LEVELS),
    _qwen_vl("Qwen2VL", ROPE, dict(embed_dim=32, hidden_size=WIDTH, mlp_ratio=2), ((2, 2, 3),)),
    _qwen_vl(
        "Qwen2_5_VL",
        ROPE,
        dict(hidden_size=32, out_hidden_size=WIDTH, intermediate_size=32, window_size=16, fullatt_block_indexes=[1]),
        ((2, 2, 3),),
    ),
    _qwen_vl(
        "Qwen3VL",
        # a head width that is not hidden_size / heads
        dict(rope_parameters=ROPE["rope_parameters"] | dict(mrope_section=[2, 2, 2]), head_dim=12),
        dict(
            hidden_size=32,
            out_hidden_size=WIDTH,
            intermediate_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ),
        ((1, 2, 3),) * 2,  # a timestamp before each frame
        hf.Qwen3VLVideoProcessor,
    ),
    _internvl("Qwen2"),
    _internvl("Llama"),
    # half of a head is not rotated
    _internvl("Phi3", rope_parameters=dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.5)),
)
