"""Labels stand at the answers' tokens and nowhere else, in the words of the processor's own template."""

import pytest
import torch

from vis_sparse import SampleError
from vis_sparse.calibration.records import Record, decoded
from vis_sparse.calibration.samples import encode
from vis_sparse.training.encoding import Encoder, _places

from .samples import FAMILIES, TURNS, conversations, loaded, row

CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request):
    return loaded(request.param)[1]


def labelled(processor, batch, index) -> list[str]:
    labels = batch["labels"][index]
    return processor.tokenizer.convert_ids_to_tokens(labels[labels >= 0])


def test_answers_alone_are_labelled(processor, tmp_path):
    rows = [row(3, 1), row(1, 2, start=1), row(2, 0), row(3, 2, start=2), row(2, 3, start=1)]
    batch = Encoder(processor)(conversations(tmp_path, *rows))
    assert {batch[name].shape for name in ("input_ids", "attention_mask", "labels")} == {batch["input_ids"].shape}
    for index, each in enumerate(rows):
        said = [turn["value"].split() for turn in each["conversations"][1::2]]
        assert labelled(processor, batch, index) == [word for words in said for word in (*words, "</s>")]
    at = batch["labels"] >= 0
    assert torch.equal(batch["labels"][at], batch["input_ids"][at])
    assert not batch["labels"][batch["attention_mask"] == 0].ge(0).any()
    assert bool((batch["attention_mask"].diff(dim=1) <= 0).all()), "padding on the right"


def test_a_single_answer_is_what_calibration_makes_of_it(processor, tmp_path):
    (conversation,) = conversations(tmp_path, row())
    batch = Encoder(processor)([conversation])
    (question, answer), image = TURNS[0], conversation.images[0]
    sample = encode(processor, Record(decoded(image, ""), question, answer))
    assert batch.keys() == sample.keys()
    for name, value in sample.items():
        assert torch.equal(batch[name], value), name


def test_sequences_are_cut_behind_their_images(tmp_path):
    processor = loaded()[1]
    rows = conversations(tmp_path, row(3, 1))
    whole, cut = Encoder(processor)(rows), Encoder(processor, most_tokens=155)(rows)
    assert cut["input_ids"].shape == (1, 155) and labelled(processor, cut, 0) == ["yes", "</s>"]
    assert torch.equal(cut["labels"], whole["labels"][:, :155])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    with pytest.raises(SampleError, match="got an image after token 100"):
        Encoder(processor, most_tokens=100)(rows)


def test_a_template_with_tokens_that_end_turns(tmp_path):
    processor = loaded()[1]
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    processor.chat_template = CHATML
    encoder, (conversation,) = Encoder(processor), conversations(tmp_path, row(2, 1))
    written = encoder.written(conversation)
    assert [written.text[first:end] for first, end in written.answers] == ["yes<|im_end|>", "two<|im_end|>"]
    assert written.text.endswith("two<|im_end|>\n") and "</s>" not in written.text
    assert labelled(processor, encoder([conversation]), 0) == ["yes", "<|im_end|>", "two", "<|im_end|>"]


def test_templates_that_rewrite_what_was_said_are_refused(tmp_path):
    processor = loaded()[1]
    processor.chat_template = "{{ messages | length }}: {{ messages[-1]['content'][-1]['text'] }}"
    with pytest.raises(SampleError, match="chat template: got .* expected an answer to go on from its prompt"):
        Encoder(processor)(conversations(tmp_path, row()))


def test_image_tokens_in_the_text_are_refused(tmp_path):
    processor = loaded("qwen2_vl")[1]
    said = row()
    said["conversations"][0]["value"] += " <|image_pad|>"
    with pytest.raises(SampleError, match="got 2 <.image_pad.> for 1 images"):
        Encoder(processor)(conversations(tmp_path, said))


def test_broken_pictures_are_named(tmp_path):
    found = conversations(tmp_path, row())
    found[0].images[0].write_bytes(b"no picture")
    with pytest.raises(SampleError, match="0.png: image: expected an image"):
        Encoder(loaded()[1])(found)


def test_a_slow_tokenizer_is_refused():
    processor = loaded()[1]

    class Slow:
        is_fast = False

    processor.tokenizer = Slow()
    with pytest.raises(SampleError, match="expected a fast tokenizer"):
        Encoder(processor)


@pytest.mark.parametrize(
    "short,full,expected",
    [
        ([1, 9, 2], [1, 7, 7, 7, 2], [0, -1, 4]),
        ([9, 2, 3], [5, 6, 2, 3], [-1, 2, 3]),
        ([1, 9, 9, 2], [1, 7, 8, 7, 8, 2], [0, -1, -1, 5]),
        ([1, 9, 2, 9, 3], [1, 7, 7, 2, 7, 3], [0, -1, 3, -1, 5]),
        ([1, 2], [1, 2], [0, 1]),
        ([9, 2, 9, 2, 2], [7, 7, 2, 7, 7, 2, 2], [-1, 2, -1, 5, 6]),
    ],
)
def test_places_of_tokens_around_images(short, full, expected):
    assert _places(short, full, 9) == expected


@pytest.mark.parametrize("short,full", [([1, 9, 2], [3, 7, 2]), ([1, 9, 2], [1, 7, 3]), ([1, 9, 5, 9, 2], [1, 7, 2])])
def test_other_text_around_images_is_refused(short, full):
    with pytest.raises(SampleError, match="other text around the images"):
        _places(short, full, 9)
