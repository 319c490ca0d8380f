"""The shipped tiny models: their files, their data, and what they answer."""

import json
import os
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, InternVLProcessor, LlavaProcessor, Qwen2VLProcessor

import vis_sparse
from vis_sparse.eval.tiny import NAMES, blocks, checkpoint, data, train, warm_start
from vis_sparse.eval.tiny.data import KINDS, Scene, questions
from vis_sparse.eval.tiny.families import FAMILIES, grid_of
from vis_sparse.eval.tiny.score import answers, prepared, score
from vis_sparse.eval.tiny.words import UNK
from vis_sparse.patches import read_layout

from ..marks import slow_but

TOWERS_MEASURED = ("llava", "qwen2_vl")  # by the calibrations that come with the models

# Well below what the logs of the shipped checkpoints say, and far above a model that sees nothing.
FLOORS = {
    "llava": {"easy_vqa": 0.97, "place": 0.96, "count": 0.90, "exists": 0.96},
    "qwen2_vl": {"easy_vqa": 0.95, "place": 0.90, "count": 0.70, "exists": 0.85},
    "internvl": {"easy_vqa": 0.97, "place": 0.95, "count": 0.88, "exists": 0.96},
}
PUBLISHED = {
    "llava": {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.7.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "multi_modal_projector.linear_2.bias",
    },
    "qwen2_vl": {
        "model.embed_tokens.weight",
        "model.layers.7.self_attn.k_proj.bias",
        "model.norm.weight",
        "visual.patch_embed.proj.weight",
        "visual.blocks.2.attn.qkv.bias",
        "visual.merger.mlp.2.weight",
    },
    "internvl": {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.7.self_attn.k_proj.weight",
        "language_model.model.norm.weight",
        "vision_tower.embeddings.patch_embeddings.projection.weight",
        "vision_tower.encoder.layer.3.lambda_1",
        "multi_modal_projector.layer_norm.weight",
    },
}
PROCESSORS = {"llava": LlavaProcessor, "qwen2_vl": Qwen2VLProcessor, "internvl": InternVLProcessor}
TOKENS = {"llava": [144] * 5, "qwen2_vl": [100, 126, 150, 168, 100], "internvl": [36, 108, 108, 180, 36]}
one_fast_family = pytest.mark.parametrize("family", slow_but(["llava"], NAMES), indirect=True)


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def processor(family):
    return AutoProcessor.from_pretrained(checkpoint(family.NAME))


@pytest.fixture(scope="module")
def model(family):
    return AutoModelForImageTextToText.from_pretrained(checkpoint(family.NAME), dtype=torch.float32).eval()


def test_checkpoint_loads_completely(family, processor, model):
    assert isinstance(processor, PROCESSORS[family.NAME])
    assert isinstance(model, family.MODEL)
    _, info = family.MODEL.from_pretrained(checkpoint(family.NAME), output_loading_info=True)
    assert not any(info.values()), info


def test_tensors_have_the_published_names_and_are_small(family):
    path = checkpoint(family.NAME) / "model.safetensors"
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        dtypes = {file.get_tensor(name).dtype for name in names}
    assert dtypes == {torch.float16}
    assert os.path.getsize(path) <= 8e6
    assert PUBLISHED[family.NAME] <= names
    assert {name.split(".")[0] for name in names} == {name.split(".")[0] for name in PUBLISHED[family.NAME]}


def test_a_qwen_has_grouped_heads_and_three_axes_of_positions():
    text = FAMILIES["qwen2_vl"].config().text_config
    assert text.num_attention_heads > text.num_key_value_heads > 1
    assert len(text.rope_parameters["mrope_section"]) == 3


def test_images_are_as_many_visual_tokens_as_their_size_says(family, processor, model):
    asked = questions("place", 5, sizes=family.SIZES)
    inputs = processor(
        images=[question.image for question in asked],
        text=[family.prompt(question.text) for question in asked],
        padding=True,
        return_tensors="pt",
    )
    found = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    assert found == TOKENS[family.NAME]
    assert found == [len(family.places(grid_of(question.image, family))) for question in asked]


def test_an_image_of_any_size_becomes_16_to_200_visual_tokens():
    images = FAMILIES["qwen2_vl"].processor().image_processor
    for size in ((9, 12), (30, 50), (97, 95), (640, 480), (300, 900)):
        grid = images(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
        assert 16 <= grid.prod() // 4 <= 200


def test_tiles_and_thumbnail_lie_where_they_were_cut():
    """The processor cuts a picture whose red is its row and whose green is its column."""
    internvl = FAMILIES["internvl"]
    images = internvl.processor().image_processor
    for height, width in internvl.SIZES:
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        picture = torch.stack([ys * 255 // height, xs * 255 // width, ys * 0], dim=-1).to(torch.uint8)
        image = Image.fromarray(picture.numpy())
        prepared = images(images=[image], do_normalize=False, return_tensors="pt")["pixel_values"]
        middles = torch.nn.functional.avg_pool2d(prepared, internvl.PATCH)[:, :2].permute(0, 2, 3, 1).reshape(-1, 2)
        expected = internvl.places(grid_of(image, internvl))
        torch.testing.assert_close(middles, expected, rtol=0, atol=0.02)


def test_chat_template_writes_the_prompt(family, processor):
    text = "which digit is at the top left?"
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    assert processor.apply_chat_template([message], add_generation_prompt=True) == family.prompt(text)


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_known(processor, kind):
    for question in questions(kind, 300):
        assert UNK not in processor.tokenizer(f"{question.text} {question.answer}")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_the_same_every_time(kind):
    few, many = questions(kind, 5), questions(kind, 40)
    for a, b in zip(few, many, strict=False):
        assert (a.text, a.answer, a.kind) == (b.text, b.answer, b.kind)
        assert a.image.tobytes() == b.image.tobytes()
    other = questions(kind, 40, seed=1)
    assert [question.text for question in many] != [question.text for question in other]


def test_sizes_change_nothing_but_the_images():
    sizes = ((80, 80), (80, 120))
    for plain, framed in zip(questions("place", 4), questions("place", 4, sizes=sizes), strict=True):
        assert (plain.text, plain.answer) == (framed.text, framed.answer)
        assert plain.image.size == (96, 96)
    assert [question.image.size for question in questions("count", 3, sizes=sizes)] == [(80, 80), (120, 80), (80, 80)]


def test_train_and_test_share_no_digit_and_no_picture():
    split = data.digit_split()
    assert (len(split["train"]), len(split["test"])) == (1300, 497)
    assert not set(split["train"]) & set(split["test"])
    train, test = ({scene.image.tobytes() for scene in data.easy_vqa_scenes(part)} for part in ("train", "test"))
    assert not train & test


def test_answers_are_balanced():
    shares = {kind: Counter(question.answer for question in questions(kind, 1000)) for kind in KINDS}
    assert set(shares["exists"]) == {"yes", "no"} and abs(shares["exists"]["yes"] - 500) < 50
    assert set(shares["count"]) == {"zero", "one", "two", "three"} and max(shares["count"].values()) < 300
    assert set(shares["place"]) == set(data.DIGITS) and max(shares["place"].values()) < 150


def test_grid_questions_are_about_what_is_drawn():
    rng = np.random.default_rng(3)
    filled = set()
    for _ in range(100):
        scene = data.grid_scene(rng, 12)
        digits = [word for word in scene.cells if word != data.EMPTY]
        filled.add(len(digits))
        assert max(Counter(digits).values()) <= data.MAX_COUNT
        for question in scene.questions:
            words = question.text.rstrip("?").split()
            if question.kind == "place":
                assert question.answer == scene.cells[data.ROWS.index(words[-2]) * 3 + data.COLUMNS.index(words[-1])]
            elif question.kind == "count":
                assert question.answer == data.DIGITS[digits.count(words[5])]
            else:
                assert question.answer == ("yes" if words[-1] in digits else "no")
    assert filled == set(range(1, 10))


def test_unknown_kind_and_too_many_questions_are_refused():
    with pytest.raises(ValueError, match="kind: got 'video'"):
        questions("video", 1)
    with pytest.raises(ValueError, match="9673 test questions"):
        questions("easy_vqa", 10_000)


def test_block_attention_is_masked_attention(family):
    scenes = data.framed([data.grid_scene(np.random.default_rng(0), blocks.QUESTIONS)], family.SIZES[-1:])
    model = family.new_model()
    batch = blocks.batch(scenes, family)
    mask, positions = blocks.block_mask(family, batch.grid), blocks.block_positions(family, batch.grid)
    with torch.no_grad():
        visual = family.visual_tokens(model, batch.pixels, batch.grid)
        masked = blocks.answer_logits(model, visual, batch.tokens, mask, positions)
        model.model.language_model.set_attn_implementation(blocks.ATTENTION)
        alike = blocks.answer_logits(model, visual, batch.tokens, None, positions)
    torch.testing.assert_close(alike, masked, rtol=1e-5, atol=1e-4)  # logits of up to 20


@pytest.mark.parametrize("name", slow_but(["internvl"], ["qwen2_vl", "internvl"]))
def test_other_families_start_with_the_language_of_the_llava(name):
    """The LLaVA's own visual tokens before the new model's decoder: most answers are right before any training."""
    llava, other = FAMILIES["llava"], FAMILIES[name]
    scenes = [Scene(question.image, (question,)) for question in questions("easy_vqa", 60)]
    batch, new = blocks.batch(scenes, llava), other.new_model()
    grid = other.SIZES[-1][0] // other.PATCH, other.SIZES[-1][1] // other.PATCH
    mask, positions = blocks.block_mask(other, grid), blocks.block_positions(other, grid)
    with torch.no_grad():
        width = new.config.text_config.hidden_size
        visual = warm_start.llava_tokens([scene.image for scene in scenes], other.places(grid), width)
        logits = blocks.answer_logits(new, visual, batch.tokens, mask, positions)
    answers = batch.targets != blocks.NO_LABEL
    right = (logits.argmax(dim=-1) == batch.targets)[answers].view(60, 2).all(dim=1)
    assert right.float().mean() > 0.75


@one_fast_family
def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path, family, monkeypatch):
    stages = tuple(replace(stage, images=(1, 1)) for stage in train.RECIPES[family.NAME])
    monkeypatch.setitem(train.RECIPES, family.NAME, stages)

    def steps(run, number):
        for _ in range(number):
            run.advance(train.vision_loss, family.visual_tokens)
            run.log(done=run.step)

    straight = train.Run(family.NAME, tmp_path / "straight")
    steps(straight, 3)
    stopped = train.Run(family.NAME, tmp_path / "stopped")
    steps(stopped, 2)
    stopped.save()
    steps(stopped, 1)  # lost: not saved
    resumed = train.Run(family.NAME, tmp_path / "stopped")
    assert resumed.step == 2
    steps(resumed, 1)
    before = dict(family.new_model(train.SEED).named_parameters())
    frozen = stages[0].frozen
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not name.startswith(frozen or "-") or torch.equal(a, before[name]), name
    logged = [json.loads(line) for line in (tmp_path / "stopped" / "training_log.jsonl").read_text().splitlines()]
    assert [record["done"] for record in logged if "done" in record] == [1, 2, 3]


@one_fast_family
def test_blocks_say_what_generate_says(family, processor, model):
    asked = [question for kind in KINDS for question in questions(kind, 8, sizes=family.SIZES)]
    together = score(model, processor, asked, batch_size=16)
    assert together == blocks.accuracy(model, [Scene(question.image, (question,)) for question in asked])


def test_the_dense_plan_is_the_model(family, processor, model):
    asked = questions("place", max(1, len(family.SIZES)), sizes=family.SIZES)
    inputs = prepared(model, processor, asked)
    with torch.no_grad():
        expected = model(**inputs).logits
        with vis_sparse.patched(model, "dense"):
            logits = model(**inputs).logits
            largest = prepared(model, processor, asked[-1:])
            model(**largest)
            assert vis_sparse.inspect(model)["last_call"].layout == read_layout(model, largest)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=1e-4)  # logits of up to 20


@pytest.mark.parametrize("plan", ["whole-50", "whole-25"])
def test_plans_for_the_tower_too_need_nothing_but_the_shipped_scores(family, processor, model, plan):
    if family.NAME not in TOWERS_MEASURED:
        pytest.skip("its scores are of the decoder alone")
    asked = questions("place", 2, sizes=family.SIZES[-1:])
    scores = checkpoint(family.NAME) / "heads.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vis_sparse.patched(model, plan, calibration=scores):
            layers = vis_sparse.inspect(model)["plan"].tower.layers
            given = answers(model, processor, asked)
    neurons = model.config.vision_config.to_dict()
    size = neurons.get("intermediate_size") or int(neurons["embed_dim"] * neurons["mlp_ratio"])
    assert len(layers[-1].ffn) == size // 2 and layers[-1].attention.stride == 16
    assert all(given)


def test_answers_are_words(family, processor, model):
    question = questions("exists", 1, sizes=family.SIZES)[0]
    assert answers(model, processor, [question])[0] in {"yes", "no"}


@pytest.mark.parametrize("kind", slow_but(["place"], KINDS))
@one_fast_family
def test_accuracy(family, processor, model, kind):
    batches, asked = [], questions(kind, 200, sizes=family.SIZES)
    accuracy = score(model, processor, asked, batch_size=50, on_batch=lambda *at: batches.append(at))
    assert batches == [(50, 200), (100, 200), (150, 200), (200, 200)]
    assert accuracy[kind] >= FLOORS[family.NAME][kind]
