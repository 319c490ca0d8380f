"""Tokens before the decoder in whole models: the unpatched decoder on the sequence without those that left."""

import copy
import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.vision_utils import get_vision_window_index

import vis_sparse
from vis_sparse import LayerPlan, LayoutError, Neighborhood, PatchError, TokenBudget, TokensBefore, VisualPlan
from vis_sparse.executor.before_scores import relevance
from vis_sparse.executor.tokens import entering
from vis_sparse.layout.packing import visual_coordinates
from vis_sparse.serving.errors import ServingError
from vis_sparse.serving.kinds import layer_kinds

from ..models import IMAGE, make_batch, make_model, run
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
    # the last layer is whole: one call a frame
    frames = int(inputs["image_grid_thw"][:, 0].sum())
    of_rows = torch.cat([weights[0].mean(0) for weights in seen[-frames:]])
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


@pytest.mark.parametrize("by", ["received", "duplicate"])
@pytest.mark.parametrize("name", ["Llava", "Qwen2VL"])
@torch.no_grad()
def test_beams_repeat_what_the_tower_said(name, by):
    """Beams, and several answers, of samples with other numbers of images: each score is the reduced sequence's."""
    case, beams = NAMES[name], 2
    model, reference = (case.build(torch.float64) for _ in range(2))
    inputs = flattened(make_request(case, SCENARIOS["mixed batch"], torch.float64).inputs)
    vis_sparse.patch(model, before_of(by))
    call = reduced.taken(model, inputs)
    stays, visual = stays_of(model, inputs)
    settings = dict(num_beams=beams, num_return_sequences=beams, length_penalty=0.0, max_new_tokens=3, do_sample=False)
    out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
    tokens = out.sequences[:, -3:]
    left = reduced.without(call, stays, visual)
    shown = reduced.without(reduced.Taken(visual[..., None].double(), call.mask, call.positions, []), stays, visual)
    scores = torch.zeros(len(tokens), dtype=torch.float64)
    repeated = reduced.Taken(
        left.embeds.repeat_interleave(beams, 0),
        left.mask.repeat_interleave(beams, 0),
        left.positions.repeat_interleave(beams, 1),
        left.deepstack,
    )
    visual = shown.embeds[..., 0].bool().repeat_interleave(beams, 0)
    for step in range(3):
        logits = reduced.logits(reference, repeated, visual)[:, -1].log_softmax(-1)
        scores += logits.gather(-1, tokens[:, step, None])[:, 0]
        repeated = reduced.with_token(reference, repeated, tokens[:, step])
        visual = torch.cat([visual, torch.zeros_like(visual[:, :1])], 1)
    torch.testing.assert_close(out.sequences_scores.double(), scores, rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_and_videos_in_one_call_are_told_apart():
    """The tower says what images received, then videos; samples have them in any order."""
    case = NAMES["Qwen2VL"]
    model, reference = (case.build(torch.float64) for _ in range(2))
    inputs = make_request(case, SCENARIOS["video"], torch.float64).inputs
    vis_sparse.patch(model, before_of("received"))
    model(**inputs)
    stays, visual = stays_of(model, inputs)
    said = {
        "image": received_unpatched(reference, inputs),
        "video": received_unpatched(
            reference, dict(pixel_values=inputs["pixel_values_videos"], image_grid_thw=inputs["video_grid_thw"])
        ),
    }
    for name, token in (("image", "image_token_id"), ("video", "video_token_id")):
        columns = inputs["input_ids"] == getattr(model.config, token)
        assert columns.any()
        found = torch.zeros(columns.shape, dtype=torch.float64)
        found[columns] = torch.from_numpy(said[name])
        packing = model.model._vis_sparse.last_prompt[1]
        for segment in packing.layout.segments:
            own = slice(segment.start, segment.end)
            if columns[segment.sample, own].all():
                count = EVERY["received"].count(segment.size)
                best = found[segment.sample, own].argsort(descending=True, stable=True)[:count]
                assert stays[segment.sample, own].nonzero()[:, 0].tolist() == sorted(best.tolist())


@torch.no_grad()
def test_plans_by_name_choose_each_for_itself(tmp_path):
    """Tokens before the decoder, a section of the tower and layers of the decoder in one plan; saved and loaded."""
    case = NAMES["Llava"]
    model, reference = (case.build(torch.float32) for _ in range(2))
    inputs = make_request(case, SCENARIOS["two images"], torch.float32).inputs
    near = LayerPlan(attention=Neighborhood(1, "both"), heads=(True, False) * 4, ffn=0.5)
    tower = VisualPlan((LayerPlan(ffn=0.5),) * 2, "tower")
    plans = {
        "dense": VisualPlan.dense(LAYERS),
        "all": before_of("received", (near, LayerPlan(tokens=TokenBudget(0.5)), near), tower),
        "stride": before_of("stride"),
    }
    expected = reference.generate(**inputs, max_new_tokens=3, do_sample=False)
    vis_sparse.patch(model, plans)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False, vis_sparse_plan="dense")
    assert torch.equal(answer, expected)
    model.generate(**inputs, max_new_tokens=3, do_sample=False, vis_sparse_plan="all")
    assert vis_sparse.inspect(model)["plan"] == plans["all"]
    logits = {}
    for name in plans:
        with vis_sparse.use_plan(model, name):
            logits[name] = model(**inputs).logits
    assert vis_sparse.inspect(model)["plan"].before == EVERY["stride"]
    model.save_pretrained(tmp_path)
    loaded = vis_sparse.from_pretrained(tmp_path, dtype=torch.float32)
    assert vis_sparse.inspect(loaded)["plans"] == vis_sparse.inspect(model)["plans"]
    twin = copy.deepcopy(model)
    for other in (loaded.eval(), twin):
        for name in plans:
            with vis_sparse.use_plan(other, name):
                assert torch.equal(other(**inputs).logits, logits[name])


@torch.no_grad()
def test_inspect_counts_what_came_in():
    case = NAMES["Llava"]
    model = case.build(torch.float32)
    inputs = flattened(make_request(case, SCENARIOS["two images"], torch.float32).inputs)
    vis_sparse.patch(model, before_of("duplicate"))
    model(**inputs)
    seen = vis_sparse.inspect(model)
    # of two pictures of 4 x 4 one is flat: its first row and column stay
    assert (seen["last_call"].layout.num_visual, seen["last_call"].entered) == (32, 7 + 16)
    settings = dict(layout=seen["last_call"].layout, text_tokens=6)
    whole = vis_sparse.flops(model, "dense", **settings)
    assert seen["flops"] < whole.total == seen["flops_dense"]
    told = vis_sparse.flops(model, before_of("duplicate"), **settings, duplicates=9 / 32)
    assert told.visual_left[0] == 2 * int(16 * 23 / 32)
    assert seen["flops"] == told.total


@torch.no_grad()
def test_duplicates_leave_before_the_tower():
    """Of two pictures of 4 x 4 patches one is flat, of which 7 stay; a class token goes with each."""
    case = NAMES["Llava"]
    model = case.build(torch.float32)
    inputs = make_request(case, SCENARIOS["two images"], torch.float32).inputs
    vis_sparse.patch(model, before_of("duplicate"))
    work = []
    for pixels in (inputs["pixel_values"], flattened(inputs)["pixel_values"]):
        with FlopCounterMode(display=False) as counter:
            model.model.get_image_features(pixels)
        work.append(counter.get_total_flops())
    layer = 2 * (4 * 32 * 32 + 2 * 32 * 32)  # of each row; torch counts no scores on a CPU
    assert work[0] - work[1] == 9 * layer, "one layer is read"


@torch.no_grad()
def test_pixels_within_the_tolerance_are_the_same():
    model = make_model("llama-gqa", dtype=torch.float32)
    batch = make_batch(model, [(5, IMAGE, 4)])
    batch.pixel_values[:] = 1.0
    batch.pixel_values[..., ::7, :] += 0.1  # every patch has such rows of pixels: none differs from another
    batch.pixel_values[..., :7] += 0.25
    entered = {}
    for tolerance in (0.0, 0.2, 0.3):
        before = TokensBefore("duplicate", tolerance=tolerance)
        vis_sparse.patch(model, VisualPlan.dense(LAYERS).replace(before=before))
        run(model, batch)
        entered[tolerance] = vis_sparse.inspect(model)["last_call"].entered
    # the second column differs from the first
    assert entered == {0.0: 10, 0.2: 10, 0.3: 7}


@pytest.mark.parametrize(("name", "by"), [(name, by) for by, names in _NOT.items() for name in names])
def test_orders_that_a_family_does_not_have_are_refused(name, by):
    model = NAMES[name].build(torch.float32)
    before = dict(vars(model.model))
    message = f"plan {by!r}: before.by: got {by} for {type(model).__name__}, expected another order: "
    with pytest.raises(PatchError, match=re.escape(message)):
        vis_sparse.patch(model, before_of(by))
    assert vars(model.model).keys() == before.keys()


def test_kept_class_tokens_lie_in_no_grid_of_the_tower():
    case = NAMES["Llava"]
    model = case.build(torch.float32)
    inputs = make_request(case, SCENARIOS["prefill"], torch.float32).inputs
    ids = inputs["input_ids"]
    at = int((ids[0] == case.placeholders[0]).nonzero()[0])
    ids = torch.cat([ids[:, :at], ids[:, at : at + 1], ids[:, at:]], 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vis_sparse.patch(model, before_of("received"))
    message = "before: got 16 tokens of the vision tower for 17 image tokens, expected those of the call's own pixels"
    with pytest.raises(LayoutError, match=re.escape(message)):
        model(**inputs, vision_feature_select_strategy="full")


def test_an_engine_refuses_them_with_a_reason():
    for by in EVERY:
        with pytest.raises(ServingError, match=f"plan '{by}': before: got .*{by}.*, expected all tokens"):
            layer_kinds([before_of(by)], 8, 2, 48)
