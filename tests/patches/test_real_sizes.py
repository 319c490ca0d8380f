"""Images of real sizes through the code that lays out calls, counted: the same as the shapes' own image rules."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from vis_sparse import VisualLayout, VisualPlan, flops
from vis_sparse.patches.internvl import INTERNVL
from vis_sparse.patches.llava_next import LLAVA_NEXT
from vis_sparse.patches.qwen_vl import QWEN2_VL, QWEN3_VL
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood

TEXT, BEFORE = 64, 35
NEXT = dict(image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])


def layout_of(family, config, tokens: int, placeholder: str = "image_token_id", **arguments) -> VisualLayout:
    """The layout of a prompt with `tokens` placeholders; pixels need no memory."""
    ids = torch.ones(1, TEXT + tokens, dtype=torch.long)
    ids[0, BEFORE : BEFORE + tokens] = getattr(config, placeholder)
    return family.read_layout(SimpleNamespace(config=config), arguments | {"input_ids": ids}, 0)


def pixels(*shape) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


IMAGES = {
    "qwen2-vl-7b at 1344 x 1008": (
        "qwen2-vl-7b",
        (1008, 1344),
        lambda: layout_of(
            QWEN2_VL, hf.Qwen2VLConfig(), 1728, pixel_values=pixels(1), image_grid_thw=torch.tensor([[1, 72, 96]])
        ),
    ),
    "llava-next-7b at 672 x 672": (
        "llava-next-7b",
        (672, 672),
        lambda: layout_of(
            LLAVA_NEXT,
            hf.LlavaNextConfig(**NEXT),
            2928,
            pixel_values=pixels(1, 5, 3, 336, 336),
            image_sizes=torch.tensor([[672, 672]]),
        ),
    ),
    "internvl2-8b with 12 tiles and a thumbnail": (
        "internvl2-8b",
        (1344, 1792),
        lambda: layout_of(INTERNVL, hf.InternVLConfig(), 13 * 256, pixel_values=pixels(13, 3, 448, 448)),
    ),
}


@pytest.mark.parametrize("name,size,layout", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("plan", ["dense", "hollow", "yopo-12"])
def test_images(name, size, layout, plan):
    laid_out = flops(name, plan, layout=layout(), text_tokens=TEXT)
    by_rule = flops(name, plan, image_size=size, text_tokens=TEXT, text_before=BEFORE)
    assert laid_out.visual_tokens == by_rule.visual_tokens
    assert laid_out.prefill.layers == by_rule.prefill.layers
    assert laid_out.kv_bytes == by_rule.kv_bytes


def test_a_video_of_16_frames():
    """Two frames a patch, 448 x 448 pixels: one grid where nothing lies between frames, eight where timestamps do."""
    video = dict(pixel_values_videos=pixels(1), video_grid_thw=torch.tensor([[8, 32, 32]]))
    joined = layout_of(QWEN2_VL, hf.Qwen2VLConfig(), 2048, "video_token_id", **video)
    apart = layout_of(QWEN3_VL, hf.Qwen3VLConfig(), 2048, "video_token_id", **video)
    assert joined == VisualLayout.from_grids([[(BEFORE, (8, 16, 16))]])
    assert apart == VisualLayout.from_grids([[(BEFORE + 256 * frame, (1, 16, 16)) for frame in range(8)]])

    for plan in ("dense", "yopo-12"):
        laid_out = flops("qwen2-vl-7b", plan, layout=joined, text_tokens=TEXT)
        by_rule = flops("qwen2-vl-7b", plan, video_frames=16, image_size=(448, 448), text_before=BEFORE)
        assert laid_out.prefill.layers == by_rule.prefill.layers
        assert laid_out.kv_bytes == by_rule.kv_bytes

    def scores(layout, frames):
        layer = LayerPlan(attention=Neighborhood(2, "both", frames))
        plan = VisualPlan((layer,) * 28)
        return flops("qwen2-vl-7b", plan, layout=layout, text_tokens=TEXT).prefill.part("scores", "visual")

    assert scores(joined, 0) == scores(apart, 0) == scores(apart, 1) < scores(joined, 1)
