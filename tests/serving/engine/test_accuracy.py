"""Held-out questions to the shipped LLaVA by lmms-eval: its own vLLM model, and this package's on transformers."""

from vis_sparse.eval.tiny import checkpoint

from .accuracy import compared, tasks_of
from .harness import served


def test_answers_to_held_out_questions(tmp_path):
    rows = compared(served(tmp_path / "llava", checkpoint("llava")), ["dense", "vtw"], tasks_of("llava"), 15)
    assert len(rows) == 8 and all(row["questions"] == 15 and not row["differ"] for row in rows), rows
    assert all(row["vllm"] == row["transformers"] for row in rows)
    assert min(row["vllm"] for row in rows if row["plan"] == "dense") > 80, rows
