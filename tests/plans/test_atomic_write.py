"""Files that are written whole or not at all."""

import pytest

from vis_sparse.plans.atomic_write import replaced


def test_folders_on_the_way_are_made(tmp_path):
    file = tmp_path / "a" / "b.txt"
    with replaced(file) as new:
        new.write_text("whole")
    assert file.read_text() == "whole"
    assert list(file.parent.iterdir()) == [file]


def test_an_interruption_leaves_the_old_file(tmp_path):
    file = tmp_path / "b.txt"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced(file) as new:
        new.write_text("ha")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
