"""Records of files, folders and tasks."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vis_sparse.calibration.records import SampleError, read_records
from vis_sparse.eval.data import records
from vis_sparse.eval.tiny.data import questions


def write_image(path):
    Image.new("RGB", (8, 8), (200, 0, 0)).save(path)


def test_records_of_a_jsonl_file(tmp_path):
    write_image(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "what?", "answer": "red"}, {"image": "a.png", "question": "why?"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_records(tmp_path / "data.jsonl")
    assert (first.image, first.question, first.answer) == (tmp_path / "a.png", "what?", "red")
    assert second.answer is None
    assert len(records(str(tmp_path / "data.jsonl"), 1, None)) == 1
    with pytest.raises(SampleError, match="samples: got 3, expected at most the 2"):
        records(str(tmp_path / "data.jsonl"), 3, None)


def test_records_of_a_parquet_file(tmp_path):
    """Images as bytes in the file, and as paths beside it."""
    write_image(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "b.png")
    images = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, {"bytes": None, "path": "images/b.png"}]
    table = pyarrow.table({"image": images, "question": ["what?", "why?"], "answer": ["red", None]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    first, second = records(str(tmp_path / "data.parquet"), 2, None)
    assert (first.image.size, first.image.getpixel((0, 0)), first.answer) == ((8, 8), (200, 0, 0), "red")
    assert (second.image, second.question, second.answer) == (tmp_path / "images/b.png", "why?", None)


def test_records_of_lmms_evals_tasks(tmp_path, monkeypatch):
    """A group's tasks come in turn: place, count, exists, as the tiny data says them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    found = records("lmms:digit_grid", 6, None)
    expected = [questions(kind, 2)[index] for index in range(2) for kind in ("place", "count", "exists")]
    assert {(r.question, r.answer, r.image.tobytes()) for r in found} == {
        (question.text, question.answer, question.image.tobytes()) for question in expected
    }
    assert len({record.question.split()[0] for record in found[:3]}) == 3
    with pytest.raises(SampleError, match="tasks: got nothing_such, expected tasks of lmms-eval"):
        records("lmms:nothing_such", 1, None)


def test_records_of_a_folder_come_by_name(tmp_path):
    for name in ("b.png", "a.jpg", "c.txt"):
        write_image(tmp_path / "x.png")
        (tmp_path / "x.png").rename(tmp_path / name)
    found = [(record.image.name, record.question) for record in read_records(tmp_path, "what?")]
    assert found == [("a.jpg", "what?"), ("b.png", "what?")]
    with pytest.raises(SampleError, match="prompt: got none"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 1: expected a JSON object"),
        ('{"question": "what?"}', "row 1: expected image and question"),
        ('{"image": "a.png", "question": "what?"}', "row 1: image: got .*a.png', expected an existing file"),
        ("[]", "row 1: expected image and question"),
    ],
)
def test_broken_data_is_refused_by_row(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(SampleError, match=message):
        list(read_records(tmp_path / "data.jsonl"))


def test_unknown_data_is_refused(tmp_path):
    with pytest.raises(
        SampleError, match="expected a .jsonl or .parquet file, an image folder, lmms:TASK, or tiny-train"
    ):
        records("tiny-test", 4, None)
    with pytest.raises(SampleError, match="expected an image folder or a .jsonl or .parquet file"):
        read_records(tmp_path / "data.csv")
