"""Parameters of which `pytest -m "not slow"` runs a few, and cases that only `pytest --all` runs."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from random import Random

import pytest


def slow_but(fast: Collection, values: Iterable) -> list:
    """`values` as parameters, marked slow but those in `fast`."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


MOST = 40  # slow cases of one test function that run without --all


def left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Of test functions with more than MOST slow cases all but MOST of them, drawn at random, the same in every run."""
    tables = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("every"):
            tables[item.nodeid.partition("[")[0]].append(item)
    large = (cases for cases in tables.values() if len(cases) > MOST)
    return [case for cases in large for case in Random(0).sample(cases, len(cases) - MOST)]
