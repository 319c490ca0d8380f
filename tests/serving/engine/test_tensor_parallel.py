"""Two workers, and a scheduler in a process of its own: each holds half of the heads and neurons, visual ones too."""

from vis_sparse.eval.random_checkpoint import random_llava

from .harness import TOLERANCE, Reference
from .running import Ask, engine, rows_entered, worst


def test_two_workers(tmp_path):
    folder = random_llava(tmp_path / "llama")
    against, plans = Reference(folder), tmp_path / "plans"
    with engine(folder, plans, processes=True, tensor_parallel_size=2) as llm:
        asks = [Ask(i, i % 3, plan) for i, plan in enumerate([None, "mix", "dense", "vtw", "shortv", "mix"])]
        assert worst(llm, asks, against, plans)[0] < TOLERANCE
        rows = llm.apply_model(rows_entered)
        assert len(rows) == 2 and rows[0] == rows[1]
