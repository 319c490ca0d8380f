"""Kept tables: which go first, and what they weigh."""

from types import SimpleNamespace

import numpy as np
import torch

from vis_sparse.executor.kept_calls import KeptCalls, held_bytes


def tables(size: int) -> SimpleNamespace:
    return SimpleNamespace(table=torch.zeros(size, dtype=torch.uint8))


def names(kept: KeptCalls) -> set[str]:
    return {name for name in "abcd" if kept.get(name) is not None}


def test_the_least_recently_used_goes_first():
    kept = KeptCalls(limit=25)
    for name in "abc":
        kept.keep(name, tables(10))
    assert names(kept) == {"a", "b", "c"}, "the newest comes on top of the limit"
    kept.get("a")
    kept.keep("d", tables(10))
    assert names(kept) == {"a", "c", "d"}


def test_what_a_run_added_is_weighed():
    kept = KeptCalls(limit=25)
    for name, size in (("a", 10), ("b", 10), ("c", 1)):
        kept.keep(name, tables(size))
    kept.get("a").more = [torch.zeros(10, dtype=torch.uint8)]
    kept.keep("d", tables(1))
    assert names(kept) == {"a", "c", "d"} and kept.bytes == 22


def test_storages_count_once_and_whole():
    array, tensor = np.zeros(100, dtype=np.uint8), torch.zeros(50, dtype=torch.uint8)
    assert held_bytes(SimpleNamespace(parts=[array[:10], array[50:]])) == 100
    assert held_bytes(SimpleNamespace(parts={"a": tensor[:1], "b": (tensor, tensor[2:])})) == 50
    assert held_bytes(SimpleNamespace(array=array[:10], tensor=tensor[:1]), arrays=False) == 50
