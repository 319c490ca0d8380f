"""LLaVA's conversation files, and what is none."""

import json

import pytest

from vis_sparse import SampleError
from vis_sparse.training.conversations import digest, read_conversations

from .samples import conversations, row, write


def test_a_row_as_messages(tmp_path):
    (found,) = conversations(tmp_path, row(turns=2, images=1))
    assert found.messages[0] == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "is there a seven?"}],
    }
    assert [message["role"] for message in found.messages] == ["user", "assistant"] * 2
    assert found.answers == [1, 3] and found.images == (tmp_path / "0.png",)


def test_images_stand_where_the_text_says(tmp_path):
    given = row(images=2) | {"conversations": [{"from": "human", "value": "is <image> not <image>?"},
                                               {"from": "gpt", "value": "yes"}]}  # fmt: skip
    (found,) = conversations(tmp_path, given)
    kinds = [part.get("text", part["type"]) for part in found.messages[0]["content"]]
    assert kinds == ["is", "image", "not", "image", "?"]


def test_lines_text_alone_and_another_folder_of_images(tmp_path):
    write(tmp_path, [row(), row(images=0)])
    (tmp_path / "lines").mkdir()
    rows = [{**row(images=0), "conversations": [{"from": "system", "value": "be"}, *row()["conversations"]]}, row()]
    rows[0] |= {"image": "0.png"}
    (tmp_path / "lines/d.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = read_conversations(tmp_path / "lines/d.jsonl", images=tmp_path)
    assert found[0].messages[0]["role"] == "system" and found[0].images == found[1].images
    with pytest.raises(SampleError, match="row 1: image: got '0.png', expected an existing file"):
        read_conversations(tmp_path / "lines/d.jsonl")


def test_a_changed_picture_or_word_is_another_digest(tmp_path):
    before = digest(conversations(tmp_path, row(), row(images=0)))
    assert before == digest(read_conversations(tmp_path / "data.json"))
    assert before != digest(conversations(tmp_path, row(start=1), row(images=0)))
    found = read_conversations(tmp_path / "data.json")
    before = digest(found)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes() + b" ")
    assert digest(found) != before


HUMAN, GPT = {"from": "human", "value": "no?"}, {"from": "gpt", "value": "no"}


@pytest.mark.parametrize(
    "rows,message",
    [
        ({}, "expected a list"),
        ([], "without a row"),
        ([3], "row 1: got 3, expected conversations"),
        ([{"conversations": []}], "expected conversations"),
        ([{"conversations": [HUMAN]}], "got turns of user, expected user and assistant in turns"),
        ([{"conversations": [GPT, HUMAN]}], "got turns of assistant, user"),
        ([{"conversations": [{"from": "system", "value": "x"}]}], "got turns of system"),
        ([{"conversations": [{"from": "robot", "value": "x"}, GPT]}], "got the turn"),
        ([{"conversations": [{"from": "human", "value": 3}, GPT]}], "got the turn"),
        ([{"conversations": [{"from": "human", "value": " "}, GPT]}], "expected text"),
        ([{"conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]}], "in human turns alone"),
        ([{"conversations": [HUMAN, GPT]}, {"conversations": [{"from": "human", "value": "<image>"}, GPT]}],
         "row 2: got 1 <image> for 0 images"),
        ([{"image": "none.png", "conversations": [HUMAN, GPT]}], "image: got 'none.png'"),
        ([{"image": [3], "conversations": [HUMAN, GPT]}], "image: got 3"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(rows, message, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(rows))
    with pytest.raises(SampleError) as error:
        read_conversations(tmp_path / "d.json")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name,text", [("d.json", "{"), ("d.jsonl", '{"a": 1}\n{'), ("d.csv", ""), ("none.json", None)])
def test_what_is_no_file_of_them_is_refused(name, text, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SampleError):
        read_conversations(tmp_path / name)
