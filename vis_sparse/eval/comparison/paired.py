"""Two plans on the same questions: McNemar's exact test, and Holm's correction for several of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np


def only_one_right(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int]:
    """How many questions only `ours` answers right, and only `theirs`; both (questions,) bool."""
    return int((ours & ~theirs).sum()), int((theirs & ~ours).sum())


def mcnemar(first: int, second: int) -> float:
    """Two-sided exact p of as uneven a split of the questions that only one of two plans answers right.

    If the plans are equally good, each of these questions falls to either side with even odds (McNemar 1947).
    """
    tail = sum(comb(first + second, few) for few in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2 ** (first + second))


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number: the chance of any false one stays below the level (Holm 1979)."""
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(np.argsort(values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected
