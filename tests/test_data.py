"""The sets of tests/data against the full ones, where those lie beside the checkout: see tests/data/README.md."""

from pathlib import Path

import numpy as np
import pytest

from . import goldens
from .data import make

FULL = Path(__file__).resolve().parents[2] / "shared" / "goldens"
SETS = [f"yopo/{name}" for name in goldens.YOPO] + [f"internvl2/{name}" for name in goldens.INTERNVL2]

if FULL.is_dir():  # a skipped test would say that a clone lacks something

    @pytest.mark.parametrize("name", SETS)
    def test_sets_hold_the_numbers_of_the_full_ones(name):
        yopo = name.startswith("yopo/")
        _, random, results = make.yopo(FULL / f"{name}.npz") if yopo else make.internvl2(FULL / name)
        for ours, theirs in zip(goldens.load(name)[1:], (random, results)):
            assert ours.keys() == theirs.keys()
            for array, expected in theirs.items():
                assert ours[array].dtype == expected.dtype
                np.testing.assert_array_equal(ours[array], expected)
