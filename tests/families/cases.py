"""The families under test: a small model of the real classes, its real processor, and what pictures become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import transformers as hf

from .processors import IDS, VOCAB, tokenizer

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

    @cache
    def processor_for(self, padding: str):
        return self.processor(tokenizer(padding))


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


def _qwen_vl(name, text: dict, vision: dict, video_processor=hf.Qwen2VLVideoProcessor, **changes):
    model_class, config_class = (getattr(hf, f"{name}{end}") for end in ("ForConditionalGeneration", "Config"))

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
        sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=2)
        image = hf.Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 64, "longest_edge": 4096})
        video = video_processor(**sizes, size={"shortest_edge": 64, "longest_edge": 4096}, do_sample_frames=False)
        return getattr(hf, f"{name}Processor")(image, words, video)

    pictures = (Visual((24, 16), ((1, 2, 3),)), Visual((8, 32), ((1, 4, 1),)))
    video = Visual((4, 24, 16), ((2, 2, 3),))
    return Case(name.replace("_", "."), model_class, config, processor, pictures, video, **changes)


ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[1, 1, 2]))

CASES = (
    _llava(hf.LlavaForConditionalGeneration, hf.LlavaConfig),
    _llava(hf.VipLlavaForConditionalGeneration, hf.VipLlavaConfig, vision_feature_layers=[-1, 1]),
    _qwen_vl("Qwen2VL", ROPE, dict(embed_dim=32, hidden_size=WIDTH, mlp_ratio=2)),
    _qwen_vl(
        "Qwen2_5_VL",
        ROPE,
        dict(hidden_size=32, out_hidden_size=WIDTH, intermediate_size=32, window_size=16, fullatt_block_indexes=[1]),
    ),
)
