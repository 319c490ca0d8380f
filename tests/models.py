"""Small random models, batches, plans and layouts, all from seeds.

A sample is written as a tuple: numbers are runs of text tokens, grids (frames, height, width) are segments.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from vis_sparse.layout import VisualLayout
from vis_sparse.plan import LayerPlan, Neighborhood, VisualPlan

from . import oracle

IMAGE = (1, 4, 4)  # what the vision tower below makes of one picture
IMAGE_TOKEN, VOCAB = 95, 96
LAYERS, HEADS, NEURONS = 3, 8, 48

_SIZES = dict(
    hidden_size=64,
    intermediate_size=NEURONS,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    vocab_size=VOCAB,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
_TEXT_CONFIGS = {
    "llama": (LlamaConfig, dict(num_key_value_heads=HEADS)),
    "llama-bias": (LlamaConfig, dict(num_key_value_heads=HEADS, attention_bias=True, mlp_bias=True)),
    "llama-gqa": (LlamaConfig, dict(num_key_value_heads=4)),
    # a head width that is not hidden_size / heads
    "mistral-gqa": (MistralConfig, dict(num_key_value_heads=2, head_dim=12, sliding_window=None)),
    "qwen2-gqa": (Qwen2Config, dict(num_key_value_heads=2)),
}
TEXT_MODELS = tuple(_TEXT_CONFIGS)


def make_model(text: str = "llama", seed: int = 0, dtype=torch.float64, **text_changes):
    """A LLaVA with random weights, wide enough spread that a misplaced key or neuron shows in the logits."""
    config, settings = _TEXT_CONFIGS[text]
    return from_text_config(config(**_SIZES | settings | text_changes), seed, dtype)


def from_text_config(text_config, seed: int = 0, dtype=torch.float64, image_size=28, patch_size=7):
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
    )
    config = LlavaConfig(vision_config=vision, text_config=text_config, image_token_id=IMAGE_TOKEN)
    config.pad_token_id = 0
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise
    return model.to(dtype)


def pristine(model):
    """A copy that stays as it is while `model` is patched."""
    return copy.deepcopy(model)


def deep_model(layers: int, dtype=torch.float64):
    """For shipped plans that name layers a small model lacks."""
    return make_model("llama-gqa", dtype=dtype, num_hidden_layers=layers, hidden_size=32, intermediate_size=32)


@dataclass(frozen=True)
class Batch:
    """Samples as a model takes them; `embeds` is what the unpatched outer model feeds its text model."""

    samples: tuple
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor | None
    embeds: torch.Tensor
    layout: VisualLayout

    @property
    def position_ids(self) -> torch.Tensor:
        return oracle.default_positions(self.attention_mask)

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def by_ids(self) -> dict:
        """Arguments of a call with input_ids, as a processor makes them."""
        call = dict(input_ids=self.input_ids, attention_mask=self.attention_mask, position_ids=self.position_ids)
        return call if self.pixel_values is None else call | dict(pixel_values=self.pixel_values)

    def by_embeds(self) -> dict:
        """Arguments of a call by someone who merged the images: to be used under `use_layout`."""
        return dict(inputs_embeds=self.embeds, attention_mask=self.attention_mask, position_ids=self.position_ids)

    def to_generate(self) -> dict:
        call = self.by_ids()
        del call["position_ids"]  # generate counts them itself
        return call


def make_batch(model, samples, padding: str = "left", seed: int = 1) -> Batch:
    """Random tokens and pictures. Samples with only IMAGE grids go through the vision tower, others get random
    embeddings in the place of their grids."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [sum(part if isinstance(part, int) else int(np.prod(part)) for part in sample) for sample in samples]
    length = max(sizes)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    grids = []
    for row, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        at = length - size if padding == "left" else 0
        mask[row, at : at + size] = 1
        grids.append([])
        for part in sample:
            if isinstance(part, int):
                ids[row, at : at + part] = torch.randint(1, IMAGE_TOKEN, (part,), generator=generator)
                at += part
            else:
                grids[-1].append((at, part))
                ids[row, at : at + int(np.prod(part))] = IMAGE_TOKEN
                at += int(np.prod(part))
    layout = VisualLayout.from_grids(grids)
    shapes = {grid for sample in grids for _, grid in sample}
    dtype = model.lm_head.weight.dtype
    pixels = None
    if shapes == {IMAGE}:
        pixels = torch.randn(len(layout.segments), 3, 28, 28, generator=generator).to(dtype)
        embeds = text_inputs(model, input_ids=ids, pixel_values=pixels)
    else:
        embeds = model.get_input_embeddings()(ids).detach().clone()
        visual = ids == IMAGE_TOKEN
        embeds[visual] = 0.15 * torch.randn(int(visual.sum()), embeds.shape[-1], generator=generator).to(dtype)
    return Batch(tuple(samples), ids, mask, pixels, embeds, layout)


def text_inputs(model, **call) -> torch.Tensor:
    """The inputs_embeds with which the unpatched `model` calls its text model."""
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    hook = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**call)
    finally:
        hook.remove()
    return seen["inputs_embeds"].detach()


def random_plan(seed: int, semantics: str = "exclude", layers: int = LAYERS) -> VisualPlan:
    """A plan whose first layer is read, so that it is never trivially text-only."""
    rng = np.random.default_rng(seed)
    plan = [_random_layer(rng) for _ in range(layers)]
    plan[0] = replace(plan[0], text_reads=True)
    return VisualPlan(tuple(plan), f"random-{seed}", semantics=semantics)


def _random_layer(rng) -> LayerPlan:
    near = Neighborhood(
        int(rng.integers(0, 3)), str(rng.choice(["causal", "both"])), int(rng.integers(0, 2)), int(rng.integers(1, 4))
    )
    attention = ["full", "none", near, near][rng.integers(4)]
    heads = [None, tuple(bool(bit) for bit in rng.integers(0, 2, HEADS))][int(rng.random() < 0.75)]
    indices = tuple(sorted(int(i) for i in rng.choice(NEURONS, rng.integers(0, NEURONS), replace=False)))
    ffn = [0.0, 1.0, float(rng.uniform(0, 1)), indices][rng.integers(4)]
    return LayerPlan(bool(rng.random() < 0.7), attention, heads, ffn)


# The same, for hypothesis to shrink.

neighborhoods = st.builds(
    Neighborhood,
    radius=st.integers(0, 3),
    direction=st.sampled_from(["causal", "both"]),
    frames=st.integers(0, 2),
    stride=st.integers(1, 3),
)
layer_plans = st.builds(
    LayerPlan,
    text_reads=st.booleans(),
    attention=st.sampled_from(["full", "none"]) | neighborhoods,
    heads=st.none() | st.tuples(*[st.booleans()] * HEADS),
    ffn=st.sampled_from([0.0, 0.25, 1.0]) | st.sets(st.integers(0, NEURONS - 1)).map(lambda s: tuple(sorted(s))),
)
plans = st.builds(
    VisualPlan,
    st.tuples(*[layer_plans] * LAYERS),
    semantics=st.sampled_from(["exclude", "zero"]),
)
grids = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5))
# text first and last, as in a prompt: the last row is the one that generation reads
samples = st.builds(
    lambda first, middle, last: (first, *middle, last),
    st.integers(0, 3),
    st.lists(grids | st.integers(1, 3), max_size=3),
    st.integers(1, 4),
)
batches = st.lists(samples, min_size=1, max_size=3).map(tuple)
