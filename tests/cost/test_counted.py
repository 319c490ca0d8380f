"""Decoders, vision towers and projectors against what torch counts on the unpatched model."""

import dataclasses
from functools import partial

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vis_sparse.cost.flops import flops
from vis_sparse.cost.shape_lookup import shape_of
from vis_sparse.layout.layout import VisualLayout


def counted(forward):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def small_llava():
    text = LlamaConfig(
        hidden_size=24,
        head_dim=8,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=50,
        pad_token_id=0,
    )
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION, image_size=56, patch_size=14))
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def test_dense_is_what_torch_counts_on_the_unpatched_model():
    model = small_llava()
    layout = VisualLayout.from_grids([[(3, (1, 4, 4))]] * 2)
    report = flops(model, "dense", layout=layout, text_tokens=9)
    text = model.model.language_model
    with torch.device("meta"):
        total = counted(lambda: text(inputs_embeds=torch.zeros(2, 25, 24)))
        # older versions of transformers multiply positions and frequencies as matrices
        total -= counted(lambda: text.rotary_emb(torch.zeros(2, 25, 24), torch.arange(25)[None]))
        head = counted(lambda: model.lm_head(torch.zeros(2, 1, 24)))
    # torch runs all n * n scores, we count the causal n(n + 1) / 2
    scores = report.prefill.part("scores")
    assert scores == 2 * 25 * 26 // 2 * 4 * 4 * 6 * 8
    assert report.prefill.total - scores == total - 2 * 25 * 25 * 4 * 4 * 6 * 8
    assert report.prefill.lm_head == head
    assert report.prefill.vision_tower is None  # a layout doesn't say what the tower ran
    assert report.prefill.whole == report.total + head


def test_the_vision_tower_and_the_projector_are_what_torch_counts():
    model = small_llava()
    with torch.device("meta"):
        total = counted(lambda: model.model.get_image_features(pixel_values=torch.zeros(2, 3, 56, 56)))
    prefill = flops(model, "dense", images=2, text_before=3, text_tokens=9).prefill
    assert prefill.vision_tower + prefill.projector == total
    assert prefill.projector == 2 * 32 * (32 * 24 + 24 * 24)

    text = LlamaConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(
            InternVLConfig(text_config=text, vision_config=VISION | {"image_size": [56, 56]})
        )
        total = counted(lambda: model.model.get_image_features(pixel_values=torch.zeros(5, 3, 56, 56)))
    prefill = flops(model, "dense", image_size=(112, 112)).prefill  # four tiles and a thumbnail
    assert prefill.vision_tower + prefill.projector == total


SMALL_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
PLANES = {"rope_parameters": SMALL_TEXT["rope_parameters"] | {"mrope_section": [2, 2, 2]}}
DEPTH = {"depth": 2, "num_heads": 2}


def frames_of_llava(kind, tower, **settings):
    config = getattr(hf, f"{kind}Config")(
        text_config=LlamaConfig(**SMALL_TEXT), vision_config=tower(**VISION, image_size=56, patch_size=14), **settings
    )
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    strategy = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    pixels = torch.zeros(1, 5, 3, 56, 56, device="meta")
    run = model.model.get_video_features
    return model.to("meta"), lambda: run(pixels, vision_feature_layer=-1, **strategy)


def frames_of_qwen(kind, vision):
    config = getattr(hf, f"{kind}Config")(text_config=SMALL_TEXT | PLANES, vision_config=vision | DEPTH)
    model = getattr(hf, f"{kind}ForConditionalGeneration")._from_config(config, attn_implementation="eager")
    tower = config.vision_config
    grid = torch.tensor([[3, 4, 6]])  # five frames, the last twice
    pixels = torch.zeros(3 * 4 * 6, 3 * 2 * tower.patch_size**2)
    return model, lambda: model.model.get_video_features(pixel_values_videos=pixels, video_grid_thw=grid)


WINDOWED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 24,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}


@pytest.mark.parametrize(
    ("made", "size"),
    [
        (lambda: frames_of_llava("LlavaNextVideo", CLIPVisionConfig), None),
        (lambda: frames_of_llava("LlavaOnevision", partial(hf.SiglipVisionConfig, vision_use_head=False)), None),
        (lambda: frames_of_qwen("Qwen2VL", {"embed_dim": 32, "hidden_size": 24}), (56, 84)),
        (
            lambda: frames_of_qwen(
                "Qwen3VL",
                {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24, "deepstack_visual_indexes": [0]},
            ),
            (64, 96),
        ),
        # two windows down, two across, cut off; one layer of three matrices in windows and one without
        (lambda: frames_of_qwen("Qwen2_5_VL", WINDOWED), (56, 84)),
    ],
    ids=["llava-next-video", "llava-onevision", "qwen2-vl", "qwen3-vl", "qwen2.5-vl"],
)
def test_the_vision_tower_and_the_projector_of_a_video_are_what_torch_counts(made, size):
    model, forward = made()
    shape = shape_of(model)
    if size:  # frames too small for the bounds stay as they are
        shape = dataclasses.replace(shape, video=dataclasses.replace(shape.video, min_pixels=1))
    prefill = flops(shape, "dense", video_frames=5, image_size=size).prefill
    assert prefill.vision_tower + prefill.projector == counted(forward)
