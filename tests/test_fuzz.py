"""A short run of the fuzz target, and that it would find something."""

import json

import pytest

from vis_sparse.executor.kept_cuts import KeptCuts
from vis_sparse.patches.state import PatchState

from . import fuzz
from .marks import slow_but

CASES = 160  # cases
FAR = 1_000_000  # their first seed: `make fuzz` starts at 0


@pytest.mark.parametrize("part", slow_but([0], range(4)))
def test_random_cases_are_the_oracle(part):
    for seed in range(FAR + part * CASES // 4, FAR + (part + 1) * CASES // 4):
        fuzz.run_case(seed)


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (KeptCuts, "refresh", lambda plain: lambda own, *of: any(c._kept for c in own._cuts) or plain(own, *of)),
        (PatchState, "plan_of", lambda plain: lambda self, cache: self.default),
    ],
    ids=["stale weights", "another plan"],
)
def test_it_finds_what_is_broken_and_goes_on_from_there(owner, name, broken, tmp_path, monkeypatch):
    out, said = tmp_path / "fuzz.jsonl", []
    assert fuzz.fuzz(2, float("inf"), out, tell=said.append)
    assert said == ["2 cases passed, seeds 0 to 1"] and fuzz.next_seed(out) == 2
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    assert not fuzz.fuzz(100, float("inf"), out, tell=said.append)
    failed = json.loads(out.read_text().splitlines()[-1])
    assert said[-1].startswith(f"failed: python -m tests.fuzz --seed {failed['seed']}  (AssertionError: ")
    assert fuzz.next_seed(out) == failed["seed"], "the case that failed is the next"
    monkeypatch.undo()
    assert fuzz.fuzz(1, float("inf"), out, tell=said.append)
    assert fuzz.next_seed(out) == failed["seed"] + 1
