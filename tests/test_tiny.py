"""The shipped tiny LLaVA: its files, its data, and what it answers."""

import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from vis_sparse.eval.tiny import blocks, checkpoint, data, train
from vis_sparse.eval.tiny.data import KINDS, Scene, questions
from vis_sparse.eval.tiny.model import UNK, new_model, prompt
from vis_sparse.eval.tiny.score import answers, score

# Well below what the log of the shipped checkpoint says, and far above a model that sees nothing.
FLOORS = {"easy_vqa": 0.97, "place": 0.96, "count": 0.90, "exists": 0.96}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(checkpoint())


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(checkpoint(), dtype=torch.float32).eval()


def test_checkpoint_loads_completely(processor, model):
    assert isinstance(processor, LlavaProcessor)
    assert isinstance(model, LlavaForConditionalGeneration)
    _, info = LlavaForConditionalGeneration.from_pretrained(checkpoint(), output_loading_info=True)
    assert not any(info.values()), info


def test_tensors_have_the_published_names_and_are_small():
    path = checkpoint() / "model.safetensors"
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        dtypes = {file.get_tensor(name).dtype for name in names}
    assert dtypes == {torch.float16}
    assert os.path.getsize(path) <= 8e6
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.7.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "multi_modal_projector.linear_2.bias",
    } <= names
    assert {name.split(".")[0] for name in names} == {"language_model", "vision_tower", "multi_modal_projector"}


def test_an_image_is_144_visual_tokens(processor, model):
    question = questions("place", 1)[0]
    inputs = processor(images=[question.image], text=[prompt(question.text)], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144


def test_chat_template_writes_the_prompt(processor):
    text = "which digit is at the top left?"
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    assert processor.apply_chat_template([message], add_generation_prompt=True) == prompt(text)


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


def test_block_attention_is_masked_attention():
    scene = data.grid_scene(np.random.default_rng(0), blocks.QUESTIONS)
    model = new_model()
    batch, mask, positions = blocks.batch([scene]), blocks.block_mask(), blocks.block_positions()
    with torch.no_grad():
        visual = blocks.visual_tokens(model, batch.pixels)
        masked = blocks.answer_logits(model, visual, batch.tokens, mask, positions)
        model.model.language_model.set_attn_implementation(blocks.ATTENTION)
        torch.testing.assert_close(blocks.answer_logits(model, visual, batch.tokens, None, positions), masked)


def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path):
    def steps(run, number):
        for _ in range(number):
            scenes = train.training_scenes(run.step)[:2]
            run.advance(train.vision_loss, scenes, train.learning_rate(run.step))
            run.log(done=run.step)

    straight = train.Run(tmp_path / "straight")
    steps(straight, 3)
    stopped = train.Run(tmp_path / "stopped")
    steps(stopped, 2)
    stopped.save()
    steps(stopped, 1)  # lost: not saved
    resumed = train.Run(tmp_path / "stopped")
    assert resumed.step == 2
    steps(resumed, 1)
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    logged = [json.loads(line) for line in (tmp_path / "stopped" / "training_log.jsonl").read_text().splitlines()]
    assert [record["done"] for record in logged if "done" in record] == [1, 2, 3]


def test_blocks_say_what_generate_says(processor, model):
    asked = [question for kind in KINDS for question in questions(kind, 8)]
    together = score(model, processor, asked, batch_size=16)
    assert together == blocks.accuracy(model, [Scene(question.image, (question,)) for question in asked])


def test_answers_are_words(processor, model):
    question = questions("exists", 1)[0]
    assert answers(model, processor, [question])[0] in {"yes", "no"}


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(processor, model, kind):
    batches = []
    accuracy = score(model, processor, questions(kind, 200), batch_size=50, on_batch=lambda *at: batches.append(at))
    assert batches == [(50, 200), (100, 200), (150, 200), (200, 200)]
    assert accuracy[kind] >= FLOORS[kind]
