"""Tokens before the decoder in whole models: the unpatched decoder on the sequence without those that left."""


import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_window_index

import vis_sparse
from vis_sparse import LayerPlan, TokensBefore, VisualPlan
from vis_sparse.executor.before_scores import relevance
from vis_sparse.executor.tokens import entering
from vis_sparse.layout.packing import visual_coordinates

from . import reduced
from .cases import CASES, LAYERS
from .scenarios import SCENARIOS, make_request

EVERY = {
    "duplicate": TokensBefore("duplicate"),
    "change": TokensBefore("change", 0.6),
    "received": TokensBefore("received", 0.5),
    "relevance": TokensBefore("relevance", 0.5),
    "stride": TokensBefore("stride", 0.3),
}
NAMES = {case.name: case for case in CASES}
_TILES = ("LlavaNext", "LlavaNextVideo", "LlavaOnevision")
_FRAMES_APART = ("Qwen3VL", "InternVL (Qwen2)", "InternVL (Llama)", "InternVL (Phi3)")
_NOT = {"duplicate": _TILES, "received": _TILES, "change": _FRAMES_APART}
PAIRS = [
    (name, by)
    for name, case in NAMES.items()
    for by in EVERY
    if name not in _NOT.get(by, ()) and (case.video or by != "change")
]
_FAST = [
    ("Llava", "received"),
    ("LlavaOnevision", "change"),
    ("VipLlava", "relevance"),
    ("Qwen2VL", "duplicate"),
    ("Qwen2VL", "change"),
    ("Qwen2.5VL", "received"),
    ("Qwen3VL", "relevance"),
    ("InternVL (Qwen2)", "received"),
    ("InternVL (Phi3)", "duplicate"),
    ("LlavaNext", "stride"),
]


def before_of(by: str, layers: tuple = (), tower=None) -> VisualPlan:
    return VisualPlan(layers or (LayerPlan(),) * LAYERS, by, before=EVERY[by], tower=tower)


def flattened(inputs: dict) -> dict:
    """The request, half of its pictures or patches flat."""
    inputs = dict(inputs)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            inputs[name] = inputs[name].clone()
            inputs[name][: (len(inputs[name]) + 1) // 2] = 0.5
    return inputs


def stays_of(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, length) bool each: the columns that a patched model's last prompt took in, and the visual ones."""
    state = model.model._vis_sparse
    packing = state.last_prompt[1]
    visual = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    whole = visual_coordinates(packing.layout)
    visual[whole.sample, whole.column] = True
    stays = ~visual
    stays[packing.visual.sample, packing.visual.column] = True
    return stays, visual


def expected_of(case, reference, inputs: dict, call: reduced.Taken, state, by: str) -> torch.Tensor:
    """(batch, length) bool: the visual columns that a plain reading of the order takes in, on the unpatched model."""
    before, packing = EVERY[by], state.last_prompt[1]
    whole = visual_coordinates(packing.layout)
    rows, scores = call.embeds[whole.sample, whole.column], None
    if by == "change":
        scores = np.zeros(len(rows))
        for index in np.flatnonzero(whole.frame > 0):
            earlier = rows[index - whole.height[index] * whole.width[index]]
            scores[index] = 1 - torch.cosine_similarity(rows[index], earlier, dim=0)
    elif by == "relevance":
        is_text = inputs["attention_mask"].bool()
        is_text[whole.sample, whole.column] = False
        scores = np.zeros(len(rows))
        for segment in np.unique(whole.segment):
            own = whole.segment == segment
            sample = whole.sample[own][0]
            text = call.embeds[sample, is_text[sample]]
            scores[own] = relevance(rows[torch.from_numpy(own)], text, before.count(int(own.sum())))
    elif by == "received":
        scores = received_unpatched(reference, inputs)
    elif by == "duplicate":
        scores = distinct_plainly(case, reference, inputs)
    kept = entering(before, whole, scores)
    found = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    found[whole.sample[kept], whole.column[kept]] = True
    return found


def received_unpatched(model, inputs: dict) -> np.ndarray:
    """What each token receives in the tower's last layer that features come from: by the unpatched tower's own calls of
    torch's attention."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention
    packed = "image_grid_thw" in inputs

    def spy(query, key, value, **settings):
        scale = settings.get("scale") or query.shape[-1] ** -0.5
        seen.append(((query @ key.transpose(-1, -2)) * scale).softmax(-1).mean(1))
        return attend(query, key, value, **settings)

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
        if packed:
            model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        else:
            model.model.vision_tower(inputs["pixel_values"])
    if not packed:
        levels = getattr(model.config, "vision_feature_layer", -1)
        level = max(each % 3 for each in (levels if isinstance(levels, list) else [levels]))  # of 2 layers
        of_patches = seen[level - 1][:, 0, 1:]
        if not hasattr(model.config, "downsample_ratio"):
            return of_patches.flatten().numpy()
        return of_patches.view(-1, 2, 2, 2, 2).mean((2, 4)).flatten().numpy()
    # the last layer is whole: one call an image
    of_rows = torch.cat([weights[0].mean(0) for weights in seen[-len(inputs["image_grid_thw"]) :]])
    of_tokens = of_rows.view(-1, 4).mean(1)
    if hasattr(model.model.visual, "window_size"):
        sizes = inputs["image_grid_thw"], 2, model.model.visual.window_size, model.model.visual.patch_size
        of_tokens = of_tokens[get_vision_window_index(*sizes)[0].argsort()]
    return of_tokens.numpy()


def distinct_plainly(case, model, inputs: dict) -> np.ndarray:
    """1 for a token whose pixels are not those of its neighbours to the left and above, token by token."""
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        sizes = [(height // 2, width // 2) for _, height, width in inputs["image_grid_thw"].tolist()]
        images = pixels.view(-1, 4 * pixels.shape[-1]).split([height * width for height, width in sizes])
        images = [image.view(*size, -1) for image, size in zip(images, sizes)]
    else:
        side = 8 if hasattr(model.config, "downsample_ratio") else 4
        images = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3)
    found = []
    for image in images:
        for y, x in np.ndindex(*image.shape[:2]):
            near = (image[y, x - 1], image[y - 1, x]) if y and x else ()
            found.append(not near or any((image[y, x] != other).any() for other in near))
    return np.array(found, dtype=float)


@pytest.mark.parametrize(
    ("name", "by"), [pytest.param(*pair, marks=[] if pair in _FAST else [pytest.mark.slow]) for pair in PAIRS]
)
@torch.no_grad()
def test_the_decoder_is_the_unpatched_one_on_what_is_left(name, by):
    """Logits of text, and greedy tokens of `generate`, with positions as they were: mixed batches, padding, videos."""
    case = NAMES[name]
    model, reference = (case.build(torch.float64) for _ in range(2))
    scenarios = ["video"] if by == "change" else ["mixed batch", "two images"]
    scenarios += ["right padding"] if by == "relevance" else []
    for scenario in scenarios:
        inputs = make_request(case, SCENARIOS[scenario], torch.float64).inputs
        inputs = flattened(inputs) if by == "duplicate" else inputs
        vis_sparse.patch(model, before_of(by))
        call = reduced.taken(model, inputs)  # with the tower as it runs under the plan
        if by != "duplicate":
            whole = reduced.taken(reference, inputs)
            torch.testing.assert_close(call.embeds, whole.embeds, rtol=1e-5, atol=1e-5)
            assert torch.equal(call.positions, whole.positions)
            call = whole
        ours = model(**inputs).logits
        stays, visual = stays_of(model, inputs)
        assert 0 < (visual & stays).sum() < visual.sum()
        assert torch.equal(stays, expected_of(case, reference, inputs, call, model.model._vis_sparse, by) | ~visual)
        left = reduced.without(call, stays, visual)
        marks = reduced.Taken(visual[..., None].double(), call.mask, call.positions, [])
        visual_left = reduced.without(marks, stays, visual).embeds[..., 0].bool()
        theirs = reduced.logits(reference, left, visual_left)
        for sample, own in enumerate(stays & inputs["attention_mask"].bool()):
            text = ~visual[sample][own]
            torch.testing.assert_close(
                ours[sample, own][text], theirs[sample, -int(own.sum()) :][text], rtol=1e-6, atol=1e-6
            )
        if SCENARIOS[scenario].padding == "left":
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
            assert torch.equal(tokens, reduced.greedy(reference, left, visual_left, 4))
        vis_sparse.unpatch(model)
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
