"""Model shapes: the shipped figures, checkpoints and live models, and image sizes to grids as transformers does it."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    VipLlavaConfig,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vis_sparse.cost.flops import flops
from vis_sparse.cost.shape_config import MODEL_TYPES, shape_of_config
from vis_sparse.cost.shape_lookup import as_shape, load_shape, shape_names, shape_of
from vis_sparse.layout.image_grids import FixedGrid, ShapeError, SmartResize

NEXT, QWEN, INTERN = (load_shape(name).image for name in ("llava-next-7b", "qwen2-vl-7b", "internvl2-8b"))
sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def parameters(shape):
    """(decoder with input embedding, vision tower) matrices of a shape, in billions."""
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    decoder = shape.layers * (attention + 3 * shape.hidden * shape.ffn) + shape.vocab * shape.hidden
    vision = shape.vision
    matrices = 3 if vision.gated else 2
    return decoder / 1e9, vision.layers * vision.hidden * (4 * vision.hidden + matrices * vision.ffn) / 1e9


@pytest.mark.parametrize(
    ("name", "decoder", "vision"),
    [
        # Vicuna, Qwen2, Phi-3 mini, InternLM2.5 7B and InternLM2 20B less their LM heads; CLIP ViT-L, Qwen's ViTs,
        # InternViT 300M and 6B: sizes as published, in billions
        ("llava-1.5-7b", 6.61, 0.30),
        ("llava-1.5-13b", 12.85, 0.30),
        ("llava-next-7b", 6.61, 0.30),
        ("qwen2-vl-2b", 1.54, 0.63),
        ("qwen2-vl-7b", 7.07, 0.63),
        ("qwen2.5-vl-7b", 7.07, 0.63),
        ("internvl2-4b", 3.72, 0.30),
        ("internvl2-8b", 7.36, 0.30),
        ("internvl2-26b", 19.29, 5.53),
    ],
)
def test_shipped_shapes_have_the_published_sizes(name, decoder, vision):
    shape = load_shape(name)
    assert shape.name == name
    assert parameters(shape) == pytest.approx((decoder, vision), rel=0.01)
    # the projector takes what the tower gives, merged or not, to the decoder's width
    assert shape.projector[0][0] % shape.vision.hidden == 0
    assert [shape.projector[0][1], shape.projector[1][1]] == [shape.projector[1][0], shape.hidden]


def test_every_shipped_shape_is_named_above():
    names = test_shipped_shapes_have_the_published_sizes.pytestmark[0].args[1]
    assert [name for name, *_ in sorted(names)] == shape_names()


def test_an_unknown_shape_names_the_nearest():
    message = (
        r"^model: got 'llava-1.5-7', expected a folder with a config.json or one of .*; did you mean 'llava-1.5-7b'\?$"
    )
    with pytest.raises(ShapeError, match=message):
        load_shape("llava-1.5-7")


def test_something_else_is_refused():
    with pytest.raises(
        ShapeError, match="^model: got list, expected a transformers model, a shape, a name or a folder$"
    ):
        as_shape([1])


def test_llava_15_takes_every_image_to_one_grid():
    encoded = load_shape("llava-1.5-7b").image.encode(123, 4567)
    assert (encoded.grids, encoded.sequences, encoded.projected) == (((1, 24, 24),), ((24, 24),), 576)


@given(sizes)
def test_llava_next_grids_are_transformers(size):
    encoded = NEXT.encode(*size)
    pinpoints = [list(pinpoint) for pinpoint in NEXT.pinpoints]
    down, across = get_anyres_image_grid_shape(list(size), pinpoints, 336)
    unpadded = unpad_image(torch.empty(1, 24 * down, 24 * across, device="meta"), size)
    _, rows, columns = unpadded.shape
    assert encoded.grids == ((1, 24, 24), (1, rows, columns + 1))
    assert encoded.sequences == ((24, 24),) * (1 + down * across)
    assert encoded.projected == 576 * (1 + down * across)


def test_llava_next_at_672_x_672_is_2928_tokens():
    assert sum(map(math.prod, NEXT.encode(672, 672).grids)) == 576 + 48 * 49 == 2928
    # 23.6 rows of image in 24: what is left of an odd padding stays
    assert NEXT.encode(330, 672).grids[1] == (1, 24, 49)


@given(sizes)
def test_qwen2_vl_grids_are_transformers(size):
    height, width = size
    if max(size) / min(size) > 200:
        with pytest.raises(ShapeError, match="aspect ratio"):
            QWEN.encode(*size)
        return
    rows, columns = smart_resize(height, width, 28, QWEN.min_pixels, QWEN.max_pixels)
    encoded = QWEN.encode(height, width)
    assert encoded.grids == ((1, rows // 28, columns // 28),)
    assert encoded.sequences == ((rows // 14, columns // 14),)
    assert encoded.projected == rows * columns // 28**2


@given(sizes)
def test_internvl_tiles_are_transformers(size):
    columns, rows = get_optimal_tiled_canvas(size, (448, 448), 1, 12)
    encoded = INTERN.encode(*size)
    assert INTERN.arrangement(*size) == (rows, columns)
    tiles = rows * columns + (rows * columns > 1)
    assert encoded.grids == ((1, 16, 16),) * tiles
    assert encoded.sequences == ((32, 32),) * tiles
    assert encoded.projected == 256 * tiles


def tokens_of(encoded):
    return sum(map(math.prod, encoded.grids))


ONEVISION = shape_of_config(LlavaOnevisionConfig(), "onevision")
NEXT_VIDEO = shape_of_config(LlavaNextVideoConfig(), "next-video")
QWEN3 = shape_of_config(Qwen3VLConfig(), "qwen3")


@given(sizes)
def test_onevision_images_are_transformers(size):
    processor = object.__new__(LlavaOnevisionProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=LlavaOnevisionConfig().image_grid_pinpoints)
    processor.num_image_tokens, processor.vision_aspect_ratio = 27 * 27, "anyres_max_9"
    assert tokens_of(ONEVISION.image.encode(*size)) == processor._get_number_of_features(*size, 384, 384)
    several = ONEVISION.image.encode_several(2, *size)
    assert [each.grids for each in several] == [((1, 27, 27), (1, 1, 1))] * 2


def processed(processor, frames, height, width):
    """The grid (times, rows, columns) in patches of a video, as the processor gives it to the model."""
    video = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    return tuple(processor(videos=[video], return_tensors="pt")["video_grid_thw"][0].tolist())


VIDEOS = [(1, 100, 100), (4, 96, 640), (5, 600, 800), (2, 1000, 1400), (7, 31, 130)]


@pytest.mark.parametrize("video", VIDEOS)
def test_videos_of_qwen2_vl_are_transformers(video):
    times, rows, columns = processed(Qwen2VLVideoProcessor(cap_pixels_per_frame=False), *video)
    for rule in (load_shape("qwen2-vl-7b").video, shape_of_config(Qwen2_5_VLConfig(), "qwen2.5").video):
        encoded = rule.encode(*video)
        assert encoded.grids == ((times, rows // 2, columns // 2),)
        assert encoded.sequences == ((rows, columns),) * times
        assert encoded.projected == times * rows * columns // 4


# the bounds that released checkpoints come with, not the class's own
QWEN3_BOUNDS = {"shortest_edge": 4096, "longest_edge": 25165824}


@pytest.mark.parametrize("video", VIDEOS[1:])
def test_videos_of_qwen3_vl_are_transformers(video):
    processor = Qwen3VLVideoProcessor(size=QWEN3_BOUNDS, do_sample_frames=False, cap_pixels_per_frame=False)
    times, rows, columns = processed(processor, *video)
    encoded = QWEN3.video.encode(*video)
    assert encoded.grids == ((1, rows // 2, columns // 2),) * times
    assert encoded.sequences == ((rows, columns),) * times
    assert encoded.projected == times * rows * columns // 4


def test_a_frame_alone_is_no_video_of_qwen3_vl():
    with pytest.raises(ShapeError, match="^video_frames: got 1, expected at least the 2 of a patch$"):
        QWEN3.video.encode(1, 64, 64)


@given(st.integers(1, 100).map(lambda pairs: 2 * pairs), sizes)
def test_numbers_of_qwen_video_patches_are_transformers(frames, size):
    if max(size) > 100 * min(size):  # sides that are scaled up first, and rounded, can end over 200
        return
    for rule, processor in (
        (load_shape("qwen2-vl-7b").video, Qwen2VLVideoProcessor(cap_pixels_per_frame=False)),
        (QWEN3.video, Qwen3VLVideoProcessor(size=QWEN3_BOUNDS, cap_pixels_per_frame=False)),
    ):
        patches = sum(height * width for height, width in rule.encode(frames, *size).sequences)
        assert patches == processor.get_num_of_video_patches(frames, *size, {})


@pytest.mark.parametrize("frames", [1, 16])
def test_videos_of_frames_of_one_size_are_transformers(frames):
    def placeholders(processor, pixels, **settings):
        settings = SimpleNamespace(video_token="v", **settings)
        return processor.replace_video_token(settings, {"pixel_values_videos": pixels}, 0).count("v")

    pixels = torch.empty(1, frames, 3, 336, 336)
    encoded = ONEVISION.video.encode(frames, 5, 7)
    assert encoded.grids == ((frames, 14, 14), (1, 1, 1))
    assert tokens_of(encoded) == placeholders(LlavaOnevisionProcessor, pixels, num_image_tokens=729)
    encoded = NEXT_VIDEO.video.encode(frames, 5, 7)
    assert encoded.grids == ((frames, 12, 12),)
    assert tokens_of(encoded) == placeholders(LlavaNextVideoProcessor, pixels, patch_size=14)
    encoded = load_shape("internvl2-8b").video.encode(frames, 5, 7)
    assert encoded.grids == ((1, 16, 16),) * frames
    markers = {"start_image_token": "", "end_image_token": "", "image_token": "v", "image_seq_length": 256}
    assert tokens_of(encoded) == placeholders(InternVLProcessor, pixels, **markers)


def test_a_live_model_and_its_folder_have_one_shape(tmp_path):
    config = LlavaConfig(text_config=LlamaConfig(**TEXT, head_dim=24), vision_config=CLIPVisionConfig(**CLIP))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    config.save_pretrained(tmp_path / "tiny")
    shape = shape_of(model)
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (3, 64, 4, 2, 24)
    assert (shape.ffn, shape.vocab, shape.qkv_bias) == (96, 100, False)
    assert shape.projector == ((32, 64), (64, 64))
    assert shape.image == FixedGrid((4, 4), (56, 56))
    folder = load_shape(tmp_path / "tiny")
    assert folder.name == "tiny"
    assert (folder.vision, folder.projector, folder.image) == (shape.vision, shape.projector, shape.image)
    assert as_shape(str(tmp_path / "tiny")) == folder


def test_a_bare_language_model_is_its_decoder():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TEXT, attention_bias=True))
    shape = shape_of(model)
    assert (shape.vision, shape.projector, shape.image) == (None, (), None)
    assert (shape.head_dim, shape.qkv_bias) == (16, True)


def test_configs_of_the_other_families():
    clip = CLIPVisionConfig(**CLIP)
    shape = shape_of_config(
        LlavaNextConfig(text_config=LlamaConfig(**TEXT), vision_config=clip, image_grid_pinpoints=[[56, 112]]), "next"
    )
    assert shape.image.encode(56, 112).grids == ((1, 4, 4), (1, 4, 9))
    shape = shape_of_config(Qwen2VLConfig(text_config=TEXT | {"vocab_size": 200000}), "qwen")
    shipped = load_shape("qwen2-vl-7b")
    assert (shape.vision, shape.projector, shape.qkv_bias) == (shipped.vision, shipped.projector, True)
    assert (shape.image, shape.video) == (shipped.image, shipped.video)
    assert isinstance(shape.image, SmartResize)
    shape = shape_of_config(InternVLConfig(text_config=LlamaConfig(**TEXT)), "intern")
    shipped = load_shape("internvl2-8b")
    assert (shape.vision, shape.image, shape.video) == (shipped.vision, shipped.image, shipped.video)
    assert shape.projector == ((4096, 64), (64, 64))
    vip = shape_of_config(VipLlavaConfig(), "vip")
    assert (vip.image.grid, vip.projector[0]) == ((24, 24), (5 * 1024, 4096))
    assert vip.vision.unread == 1
    qwen = shape_of_config(Qwen2_5_VLConfig(), "qwen2.5")
    assert (qwen.image, qwen.video) == (load_shape("qwen2-vl-7b").image, load_shape("qwen2-vl-7b").video)
    assert (qwen.vision.window, qwen.vision.full, qwen.vision.gated, qwen.qkv_bias) == (8, (7, 15, 23, 31), True, True)


def test_a_pooling_that_computes_is_no_rule_of_videos():
    shape = shape_of_config(LlavaNextVideoConfig(spatial_pool_mode="conv"), "conv")
    assert (shape.image, shape.video) == (NEXT_VIDEO.image, None)


def test_a_family_without_a_rule_is_refused_with_those_that_have_one(tmp_path):
    Idefics3Config(vision_config=SiglipVisionConfig().to_dict()).save_pretrained(tmp_path / "idefics")
    message = (
        "model: idefics has no rule from image sizes to visual tokens, expected layout= or a model of type "
        "internvl, llava, llava_next, llava_next_video, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl, vipllava"
    )
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        flops(tmp_path / "idefics", "dense")
    assert message.endswith(", ".join(MODEL_TYPES))


def test_a_folder_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of-the-future"}')
    with pytest.raises(
        ShapeError, match=re.escape(f"model: got {tmp_path}, expected a config.json that transformers knows")
    ):
        load_shape(tmp_path)
