"""Parameters of which `pytest -m "not slow"` runs a few."""

from collections.abc import Collection, Iterable

import pytest


def slow_but(fast: Collection, values: Iterable) -> list:
    """`values` as parameters, marked slow but those in `fast`."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
