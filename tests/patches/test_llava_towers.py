"""What LLaVA checkpoints as published do with their tower: keep the class token, or put break tokens between rows."""

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

import vis_sparse
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.plans.plan import VisualPlan

from .. import oracle
from ..models import IMAGE_TOKEN, LAYERS, make_model, random_plan, text_inputs

SIDE = 4
TOKENS = 1 + SIDE * SIDE


@torch.no_grad()
def test_a_class_token_is_a_grid_of_one():
    """Under vision_feature_select_strategy="full" it stands before the patches of its image."""
    model = make_model()
    model.config.vision_feature_select_strategy = "full"
    ids = torch.tensor([[5, 6, 7, *[IMAGE_TOKEN] * TOKENS, 8, *[IMAGE_TOKEN] * TOKENS, 9, 10]])
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    call = dict(input_ids=ids, pixel_values=pixels)
    unpatched, embeds = model(**call).logits, text_inputs(model, **call)
    grids = [(3, (1, 1, 1)), (4, (1, SIDE, SIDE)), (4 + TOKENS, (1, 1, 1)), (5 + TOKENS, (1, SIDE, SIDE))]
    layout = VisualLayout.from_grids([grids])
    with vis_sparse.patched(model, VisualPlan.dense(LAYERS)):
        torch.testing.assert_close(model(**call).logits, unpatched, atol=1e-6, rtol=1e-6)
        assert vis_sparse.inspect(model)["last_call"].layout == layout
    plan = random_plan(4)
    expected = oracle.logits(model, plan, layout, embeds)[:, -2:]
    with vis_sparse.patched(model, plan):
        torch.testing.assert_close(model(**call).logits[:, -2:], expected, atol=1e-5, rtol=1e-5)


def test_a_pixtral_tower_is_refused():
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=96, pad_token_id=0
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    model = LlavaForConditionalGeneration(config)
    with pytest.raises(vis_sparse.PatchError, match="got a pixtral tower, .* expected one whose patches lie in a row"):
        vis_sparse.patch(model)
    assert vis_sparse.inspect(model) is None
