"""Small random models, batches and plans, all from seeds, and the calls that tests make with them.

A sample is written as a tuple: numbers are runs of text tokens, grids (frames, height, width) are segments.
"""

from __future__ import annotations

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

import vis_sparse
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.plans.layer_plan import TOKEN_ORDERS, LayerPlan, Neighborhood, PlanError, TokenBudget
from vis_sparse.plans.plan import VisualPlan

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


def from_text_config(
    text_config, seed: int = 0, dtype=torch.float64, image_size=28, patch_size=7, image_token=IMAGE_TOKEN
):
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
    )
    config = LlavaConfig(vision_config=vision, text_config=text_config, image_token_id=image_token)
    config.pad_token_id = 0
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise
    if image_token < text_config.vocab_size:
        model.lm_head.weight.data[image_token] = 0  # as good as never generated
    return model.to(dtype)


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


def text_inputs(model, grad: bool = False, **call) -> torch.Tensor:
    """The inputs_embeds with which the unpatched `model` calls its text model."""
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    hook = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.set_grad_enabled(grad):
            model(**call)
    finally:
        hook.remove()
    return seen["inputs_embeds"]


def extended(model, batch: Batch, steps: int, seed: int = 2) -> Batch:
    """`batch` with `steps` more text tokens in every sample, as decoding feeds them."""
    tokens = torch.randint(1, IMAGE_TOKEN, (len(batch.samples), steps), generator=torch.Generator().manual_seed(seed))
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, tokens], dim=1),
        attention_mask=torch.cat([batch.attention_mask, torch.ones_like(tokens)], dim=1),
        embeds=torch.cat([batch.embeds, model.get_input_embeddings()(tokens).detach()], dim=1),
    )


def every_cut(batch: Batch) -> list[int]:
    """All columns at which a prefill chunk may end: those outside every segment."""
    inside = {column for s in batch.layout.segments for column in range(s.start + 1, s.end)}
    return [column for column in range(1, batch.length + 1) if column not in inside]


def scored_cuts(batch: Batch) -> list[int]:
    """Those of `every_cut` that follow text in every sample, so that text of its own call chooses among the tokens."""
    visual = oracle.grid_of(batch.layout, batch.length).visual
    real = batch.attention_mask.bool()

    def follows_text(cut: int) -> bool:
        lasts = (real[row, :cut].nonzero() for row in range(len(real)))
        return all(not len(last) or not visual[row, last[-1, 0]] for row, last in enumerate(lasts))

    return [cut for cut in every_cut(batch) if follows_text(cut)]


def cuts_for(plan: VisualPlan, batch: Batch) -> list[int]:
    """Columns at which a prefill chunk may end under `plan`."""
    scored = any(layer.tokens and layer.tokens.by == "attention" for layer in plan.layers)
    return scored_cuts(batch) if scored else every_cut(batch)


def run(model, batch: Batch, cuts=(), by: str = "ids", cache=None, start: int = 0):
    """(logits of all rows from `start` on, cache): one call for each chunk that ends at a column of `cuts`.

    by: "ids" (input_ids and pixel_values), "embeds" (inputs_embeds under `use_layout`).
    """
    logits = []
    for end in [*[cut for cut in cuts if start < cut < batch.length], batch.length]:
        call = dict(
            attention_mask=batch.attention_mask[:, :end],
            position_ids=batch.position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        if by == "embeds":
            with vis_sparse.use_layout(model, batch.layout):
                out = model(inputs_embeds=batch.embeds[:, start:end], **call)
        else:
            pictures = [start <= s.start < end for s in batch.layout.segments]
            pixels = dict(pixel_values=batch.pixel_values[pictures]) if any(pictures) else {}
            out = model(input_ids=batch.input_ids[:, start:end], **pixels, **call)
        logits.append(out.logits)
        cache, start = out.past_key_values, end
    return torch.cat(logits, dim=1), cache


def random_plan(seed: int, semantics: str = "exclude", layers: int = LAYERS) -> VisualPlan:
    """A plan whose first layer is read, so that it is never trivially text-only."""
    rng = np.random.default_rng(seed)
    plan = [_random_layer(rng) for _ in range(layers)]
    plan[0] = replace(plan[0], text_reads=True)
    return VisualPlan(tuple(plan), f"random-{seed}", semantics=semantics)


def dropping(seed: int, **settings) -> VisualPlan:
    """A random plan under which tokens leave after some of its layers, always after the first."""
    plan, rng = random_plan(seed, **settings), np.random.default_rng(seed)
    budgets = [TokenBudget(float(rng.uniform(0.2, 0.9)), str(rng.choice(TOKEN_ORDERS))) for _ in plan.layers]
    layers = [
        replace(layer, tokens=budget) if index == 0 or rng.random() < 0.6 else layer
        for index, (layer, budget) in enumerate(zip(map(_readable, plan.layers), budgets))
    ]
    return _whole_grids_first(layers)


def _readable(layer: LayerPlan) -> LayerPlan:
    heads = layer.heads if layer.heads is None or any(layer.heads) else None
    return replace(layer, text_reads=True, heads=heads)


def _whole_grids_first(layers) -> VisualPlan:
    """Budgets that come too late for "stride" choose by "norm"."""
    left, kept = False, []
    for layer in layers:
        late = left and layer.tokens and layer.tokens.by == "stride"
        kept.append(replace(layer, tokens=replace(layer.tokens, by="norm")) if late else layer)
        left = left or layer.tokens is not None
    return VisualPlan(tuple(kept), "dropping")


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
budgets = st.builds(TokenBudget, st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.sampled_from(TOKEN_ORDERS))


def _with_tokens(layer: LayerPlan, budget: TokenBudget | None) -> LayerPlan:
    try:
        return replace(layer, tokens=budget)
    except PlanError:  # nothing is read there that could be scored
        return replace(layer, tokens=replace(budget, by="norm"))


dropping_plans = st.lists(
    st.builds(_with_tokens, layer_plans, st.none() | budgets), min_size=LAYERS, max_size=LAYERS
).map(_whole_grids_first)
plans = dropping_plans | st.builds(
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
