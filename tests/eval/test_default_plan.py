"""The measurement of the default plan on the small models."""

import re

import pytest

from vis_sparse.eval.default_plan import row


@pytest.mark.slow
def test_a_row_has_both_scores_and_who_was_right_alone():
    told = []
    cells = row("llava", 3, lambda *step: told.append(step)).strip("| ").split(" | ")
    assert cells[0] == "llava" and len(cells) == 6 and told[-1][0] == told[-1][1]
    for cell in cells[1:5]:
        dense, plan, won, lost = map(float, re.fullmatch(r"(.+)% / (.+)% \(\+(.+) -(.+)\)", cell).groups())
        assert 60 < dense <= 100 and round(3 * (plan - dense) / 100) == won - lost
    assert float(cells[5]) < 1e-6  # on 8 layers text sees what it sees under the dense plan
