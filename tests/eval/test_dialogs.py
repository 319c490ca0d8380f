"""Pages of words and talks about images: what is asked is what is drawn, and held-out things are held out."""

import re
from collections import Counter

import numpy as np
import pytest

from vis_sparse.eval.tiny import data, reading
from vis_sparse.eval.tiny.dialogs import BESIDE, conversations, description, questions
from vis_sparse.eval.tiny.reading import ORDINALS, READING, SIZES, WORDS, full_page, page


def pages(split: str, number: int, seed: int = 0) -> list[reading.Page]:
    rng = np.random.default_rng(seed)
    return [page(rng, split, WORDS) for _ in range(number)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_words_lie_in_their_boxes(split):
    for shown in pages(split, 60):
        pixels = np.asarray(shown.image).astype(int)
        paper = np.bincount((pixels @ [1, 256, 65536]).flatten()).argmax()
        ink = (pixels @ [1, 256, 65536]) != paper
        for line in shown.lines:
            left, top, right, bottom = line.box
            assert 0 <= left < right <= data.IMAGE_SIZE and 0 <= top < bottom <= data.IMAGE_SIZE
            assert ink[top:bottom, left:right].any()
            ink[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = False
        assert not ink.any(), [line.word for line in shown.lines]


def test_lines_are_from_top_to_bottom_and_differ():
    for shown in pages("test", 100):
        boxes = [line.box for line in shown.lines]
        assert all(above[3] <= below[1] for above, below in zip(boxes, boxes[1:], strict=False))
        assert len({line.word for line in shown.lines}) == len(boxes)


def test_test_pages_have_other_combinations_sizes_and_places():
    seen = {split: {tuple(line.word for line in shown.lines) for shown in pages(split, 2000)} for split in SIZES}
    assert not seen["train"] & seen["test"]
    assert not set(SIZES["train"]) & set(SIZES["test"])
    for split, odd in (("train", 0), ("test", 1)):
        edges = {edge % 2 for shown in pages(split, 50) for line in shown.lines for edge in line.box[:2]}
        assert edges == {odd}


def test_a_full_page_has_many_words_that_do_not_overlap():
    rng = np.random.default_rng(0)
    shown = [full_page(rng, WORDS) for _ in range(10)]
    assert np.mean([len(one.lines) for one in shown]) > 7
    for one in shown:
        taken = np.zeros((data.IMAGE_SIZE, data.IMAGE_SIZE), dtype=bool)
        for line in one.lines:
            left, top, right, bottom = line.box
            assert not taken[top:bottom, left:right].any()
            taken[top:bottom, left:right] = True
            assert len(line.ends) == len(line.word) and list(line.ends) == sorted(line.ends)


def test_reading_questions_are_the_same_every_time_and_balanced():
    few, many = questions(READING, 5), questions(READING, 400)
    for a, b in zip(few, many, strict=False):
        assert (a.text, a.answer) == (b.text, b.answer) and a.image.tobytes() == b.image.tobytes()
    assert {question.kind for question in many} == {READING}
    asked = Counter(question.text for question in many)
    assert set(asked) == {f"what does the {which} line say?" for which in (*ORDINALS, "last")}
    assert max(Counter(question.answer for question in many).values()) < 10
    assert questions("place", 3)[2].answer == data.questions("place", 3)[2].answer


def test_conversations_are_about_what_is_drawn():
    talks = conversations(90, "test")
    leaning = [turn for talk in talks for turn in talk.turns if turn.leans]
    assert all(len(talk.turns) == 4 and not talk.turns[0].leans for talk in talks)
    assert 60 < len(leaning) < 220
    assert {turn.answer for talk in talks[::3] for turn in talk.turns} & set(WORDS)
    assert all(a.turns == b.turns for a, b in zip(talks, conversations(90, "test"), strict=True))


def test_what_is_beside_a_place_is_what_the_grid_has_there():
    rng = np.random.default_rng(0)
    from vis_sparse.eval.tiny.dialogs import asked_of, grid_talk

    seen = set()
    for _ in range(200):
        scene = data.grid_scene(rng, 12, "test")
        talk = grid_talk(rng, scene, asked_of(scene))
        for before, turn in zip(talk, talk[1:], strict=False):
            if turn.kind == "beside":
                row, column = re.search(r"at the (\w+) (\w+)\?", before.text).groups()
                way = next(way for way in BESIDE if way in turn.text)
                y, x = data.ROWS.index(row) + BESIDE[way][0], data.COLUMNS.index(column) + BESIDE[way][1]
                assert turn.answer == scene.cells[y * 3 + x].replace(data.EMPTY, "nothing")
                seen.add(way)
            elif turn.leans:
                assert turn.answer == data.DIGITS[scene.cells.count(before.answer)]
                seen.add("count")
    assert seen == {*BESIDE, "count"}


def test_the_line_below_is_the_one_below():
    from vis_sparse.eval.tiny.dialogs import page_talk

    rng = np.random.default_rng(0)
    for shown in pages("test", 100):
        words, at = [line.word for line in shown.lines], None
        for turn in page_talk(rng, shown):
            if turn.leans:
                at += 1 if "below" in turn.text else -1
                assert turn.answer == words[at]
            at = words.index(turn.answer) if turn.answer in words else at


def test_a_description_names_everything():
    rng = np.random.default_rng(0)
    shown = pages("test", 1)[0]
    assert all(line.word in description(shown).answer for line in shown.lines)
    scene = data.grid_scene(rng, 1)
    told = re.findall(r"\b(?:" + "|".join((*data.DIGITS, "nothing")) + r")\b", description(scene).answer)
    assert [word.replace("nothing", data.EMPTY) for word in told] == list(scene.cells)
