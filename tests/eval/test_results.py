"""`make results`: the plans that it adds and the table that it writes."""

from pathlib import Path

import pytest
from datasets import Dataset

from vis_sparse.cost.flops import flops
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.eval.results import BUDGETS, END, IMAGES, START, TEXT, insert, pruned, section, shrunk, table
from vis_sparse.eval.tasks import tiny
from vis_sparse.eval.tiny import NAMES, checkpoint
from vis_sparse.eval.tiny.data import questions
from vis_sparse.eval.tiny.families import FAMILIES

FACTS = {
    "model": "tiny/llava", "machine": {"cpu": "one", "threads": 2, "device": "cpu"},
    "versions": {"torch": "2", "transformers": "5"}, "date": "2026-01-02T03", "samples": 7,
}  # fmt: skip


def row(task, plan, value, metric="exact_match", **changes):
    costs = {"gflops": 1.0, "gflops_dense": 4.0, "kv_mib": 1.0, "kv_mib_dense": 2.0, "speedup": 1.5}
    return FACTS | costs | {"task": task, "plan": plan, "metric": metric, "value": value} | changes


ROWS = [
    row("easy_vqa", "dense", 1.0, gflops=4.0, kv_mib=2.0, speedup=None),
    row("digit_grid_place", "dense", 0.9, gflops=4.0, kv_mib=2.0, speedup=None),
    row("easy_vqa", "fastv-50", 0.5),
    row("digit_grid_place", "fastv-50", 0.25, gflops=3.0, speedup=2.5),
    row("digit_grid_turns", "fastv-50", 0.125, "later_turns", gflops=None, speedup=None),
]


@pytest.mark.parametrize("family", NAMES)
def test_pruning_spends_the_budget_and_no_more(family):
    shape = load_shape(checkpoint(family))

    def spent(plan):
        return flops(shape, plan, image_size=IMAGES[family], text_tokens=TEXT, text_before=2).prefill.lane("visual")

    plans = list(pruned(family))
    assert len({plan.name for plan in plans}) == len(plans) == 6
    for plan in plans:
        budget = int(plan.name.rpartition("-")[2]) / 100
        assert budget in BUDGETS
        assert budget - 0.06 < spent(plan) / spent("dense") <= budget, plan.name


@pytest.mark.parametrize(
    ("kind", "family"), [("count", "llava"), ("count_framed", "qwen2_vl"), ("easy_vqa_tiled", "internvl")]
)
def test_tasks_ask_the_held_out_questions_of_a_model(kind, family, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiny, "QUESTIONS", 6)
    documents = Dataset.from_parquet(getattr(tiny, f"{kind}_data")["data_files"]["test"], cache_dir=str(tmp_path))
    expected = questions(kind.rpartition("_")[0] or kind, 6, sizes=FAMILIES[family].SIZES)
    for document, question in zip(documents, expected, strict=True):
        assert (document["question"], document["answer"]) == (question.text, question.answer)
        assert tiny.doc_to_visual(document)[0].tobytes() == question.image.tobytes()


def test_table_has_a_line_a_plan():
    lines = table(ROWS).splitlines()
    assert lines[0] == "| plan | FLOPs | KV cache | speed-up | easy_vqa | place | turns 2-4 |"
    assert lines[2] == "| dense | 100% | 100% | 1 | 100.0 | 90.0 |  |"
    assert lines[3] == "| fastv-50 | 50% | 50% | 2.00 | 50.0 | 25.0 | 12.5 |"
    assert "one, 2 threads, torch 2, transformers 5, 2026-01-02" in section({"llava": ROWS})


def test_the_page_of_results_has_the_marks():
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    changed = insert(page, "new")
    assert changed.count("new\n" + END) == 1
    assert changed[: changed.index(START)] == page[: page.index(START)]


def test_section_replaces_the_last_one():
    before = f"a\n{START}\nold\n{END}\nz"
    assert insert(insert(before, "new"), "newer") == f"a\n{START}\nnewer\n{END}\nz"
    with pytest.raises(ValueError, match="expected the marks"):
        insert("nothing", "new")


def test_shrunk_images_stand_beside_full_ones():
    full = [row("easy_vqa_framed", "dense", 0.75, gflops=4.0, kv_mib=2.0, speedup=None)]
    costs = {"gflops": 2.0, "gflops_dense": 2.0, "kv_mib": 1.0, "kv_mib_dense": 1.0, "speedup": None}
    small = [row("easy_vqa_half", "dense", 0.5, **costs)]
    lines = table(full + shrunk(small, full, "half")).splitlines()
    assert lines[2] == "| dense | 100% | 100% | 1 | 75.0 |"
    assert lines[3] == "| image-half | 50% | 50% |  | 50.0 |"
