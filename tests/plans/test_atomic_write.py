"""Files that are written whole or not at all."""

import os

import numpy as np
import pytest

from vis_sparse.plans.atomic_write import replaced
from vis_sparse.plans.tensor_file import write_tensors


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


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_who_may_read_a_file_of_tensors_is_as_for_any_other(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "any").touch()
        write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(2)}, {})
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("any", "a.safetensors")]
    assert modes == [0o666 & ~mask] * 2
