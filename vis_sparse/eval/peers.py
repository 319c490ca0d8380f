"""`vis-sparse bench --peers`: what users would install instead, in the same run on the same model.

The model is Qwen2.5-VL (which all of them know) at a shape's width with random weights and a vision tower that is only
there to load; one image comes first in the prompt, where `sparsevlm` takes visual tokens to be. Timed is `generate`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.initialization import no_init_weights

import vis_sparse

from ..cost.shapes import ModelShape
from ..plans.plan import VisualPlan
from .bench_model import decoder_sizes, fill_randomly
from .memory import PeakBytes
from .timing import in_turns, machine_facts, paired_ratio, timed

GRID = (24, 24)  # visual tokens of the image
KEPT = 0.25  # of the visual tokens, where tokens are pruned
NEW_TOKENS = 8
FLEX = "FlexAttention"
_IMAGE, _VIDEO, _START, _END = range(4)
_TEXT = 5  # a token id that is neither


def qwen2_5_vl(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with the decoder of `shape`, random weights, and one layer of vision tower."""
    eighth = shape.head_dim // 8
    config = Qwen2_5_VLConfig(
        text_config=dict(
            **decoder_sizes(shape),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2 * eighth, eighth, eighth],
            },
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=_TEXT,
        ),
        vision_config=dict(
            depth=1,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=shape.hidden,
            fullatt_block_indexes=[0],
        ),
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
    )
    config.dtype = dtype
    with device, no_init_weights():
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    fill_randomly(model, torch.Generator(device).manual_seed(0))
    return model


def prompt(model, text_tokens: int) -> dict:
    """Inputs of one sample: an image of GRID visual tokens, and `text_tokens` of text behind it."""
    vision = model.config.vision_config
    height, width = (side * vision.spatial_merge_size for side in GRID)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids = torch.full((1, GRID[0] * GRID[1] + text_tokens), _TEXT)
    ids[:, : GRID[0] * GRID[1]] = _IMAGE
    place = {"device": model.device}
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids, **place),
        "mm_token_type_ids": (ids == _IMAGE).long().to(model.device),
        "pixel_values": torch.randn(height * width, values, dtype=model.dtype, **place),
        "image_grid_thw": torch.tensor([[1, height, width]], **place),
    }


@contextmanager
def eager_attention(model):
    """What returns attention matrices, which some peers need."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def ways(model, inputs: dict, plans: dict[str, VisualPlan]) -> dict[str, tuple[Callable, Callable]]:
    """What is compared: (a context that makes the model ready, a call in it that generates NEW_TOKENS) by name."""

    def generate():
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    def patched(plan, backend):
        return partial(vis_sparse.patched, model, plan, heads="first", backend=backend)

    def sparsevlm():
        from sparsevlm import sparsevlm_generate

        visual = GRID[0] * GRID[1]
        settings = {"n_vis": visual, "keep_n_vis": int(KEPT * visual), "max_new_tokens": NEW_TOKENS}
        return sparsevlm_generate(model, None, inputs, device=str(model.device), **settings)

    def natten():
        import natten

        raise RuntimeError(f"natten {natten.__version__} has attention kernels only: see `vis-sparse bench kernels`")

    return {
        "unpatched": (nullcontext, generate),
        "unpatched, eager attention": (partial(eager_attention, model), generate),
        **{f"vis_sparse, {name}": (patched(plan, "auto"), generate) for name, plan in plans.items()},
        **{f"vis_sparse, {name}, {FLEX}": (patched(plan, "flex"), generate) for name, plan in plans.items()},
        f"sparsevlm, {KEPT:.0%} of the tokens": (partial(eager_attention, model), sparsevlm),
        "natten": (nullcontext, natten),
    }


def peers(
    shape: ModelShape,
    plans: dict[str, VisualPlan],
    *,
    text_tokens: int = 64,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 5,
    on_turn=lambda done, total: None,
) -> list[dict]:
    """A row for everything compared: seconds of `generate` in turns, bytes, or `why` it did not run."""
    place = torch.device(device)
    model = qwen2_5_vl(shape, getattr(torch, dtype), place)
    calls = ways(model, prompt(model, text_tokens), plans)
    peaks, reasons = {}, {}
    for name, (context, call) in calls.items():
        try:
            with context():
                call()  # compiles, makes tables, and shows whether it runs at all
                # torch cannot run a compiled FlexAttention with a dispatch mode on
                with nullcontext() if FLEX in name else PeakBytes() as memory:
                    call()
            peaks[name] = memory and memory.peak
        except Exception as error:  # a peer's failure, of whatever kind, is a row of the table
            reasons[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]

    def turn(name: str) -> dict[str, float]:
        context, call = calls[name]
        with context():
            call()  # what getting ready leaves to the first call
            return {"s": timed(call, place)}

    samples = in_turns(list(peaks), turn, repeats, on_turn)
    setting = {
        "model": f"Qwen2.5-VL at the width of {shape.name}",
        "layers": shape.layers,
        "dtype": dtype,
        "repeats": repeats,
        "visual_tokens": GRID[0] * GRID[1],
        "text_tokens": text_tokens,
        "new_tokens": NEW_TOKENS,
        **machine_facts(place),
    }
    return [{"peer": name, **setting, **_figures(name, samples, peaks, reasons)} for name in calls]


def _figures(name: str, samples: dict, peaks: dict, reasons: dict) -> dict:
    if name in reasons:
        return {"why": reasons[name]}
    seconds = samples[name]["s"]
    return {
        "s": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "speedup": paired_ratio(samples["unpatched"]["s"], seconds),
        "peak_bytes": peaks[name],
    }
