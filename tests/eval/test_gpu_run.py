"""The run for a lent GPU, tried without one: its parts, its limits, and the tables that it writes."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vis_sparse.eval.gpu import run as run_module
from vis_sparse.eval.gpu.parts import MINUTES, Part, parts
from vis_sparse.eval.gpu.tables import NOTHING, TABLES, write_tables

PAGE = Path(__file__).parents[2] / "docs/kernels.md"


def test_limits_fit_the_lent_minutes():
    for dry in (False, True):
        found = parts(dry)
        assert sum(part.limit for part in found) <= 60 * MINUTES
        assert len({part.name for part in found}) == len(found)


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch):
    own = [
        Part("fails", "", 60, ("-c", "print('a reason'); raise SystemExit(3)")),
        Part("hangs", "", 6, ("-c", "import time; time.sleep(600)")),
        Part("works", "", 60, ("-c", "import sys; open(sys.argv[1], 'w').write('[1]')", "{json}")),
    ]
    monkeypatch.setattr(run_module, "parts", lambda dry: own)
    found = run_module.run(tmp_path)
    assert found == json.loads((tmp_path / "results.json").read_text())
    codes = {name: part["rc"] for name, part in found["parts"].items()}
    assert codes == {"fails": 3, "hangs": "timeout", "works": 0}
    assert "a reason" in found["parts"]["fails"]["log"] and found["parts"]["works"]["results"] == [1]


def test_no_part_begins_when_the_time_is_over(tmp_path):
    found = run_module.run(tmp_path, dry=True, only=["tests"], within=1)
    assert found["parts"]["tests"]["rc"] is None


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got nothing, expected ceilings, tests"):
        run_module.run(tmp_path, only=["nothing"])


def test_the_page_is_what_the_command_writes(tmp_path):
    """Without results: predictions, and nothing measured."""
    page = tmp_path / "kernels.md"
    page.write_text(PAGE.read_text())
    write_tables(page, None)
    assert page.read_text() == PAGE.read_text()


def test_a_page_without_a_place_for_a_table_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="gpu: near"):
        write_tables(page, None)


@pytest.mark.slow
def test_dry_run_and_its_tables(tmp_path):
    """Every part as it would run on a GPU, small, and the page with its results."""
    command = [sys.executable, "-m", "vis_sparse.eval.gpu", "run", "--dry", "--out", tmp_path]
    subprocess.run(command, capture_output=True, timeout=1800, check=False)
    found = json.loads((tmp_path / "results.json").read_text())
    failed = {name: part["log"] for name, part in found["parts"].items() if part["rc"] != 0}
    if find_spec("vis_sparse.eval.bench_host") is None:
        failed.pop("host")
    assert not failed
    page = tmp_path / "kernels.md"
    page.write_text(PAGE.read_text())
    write_tables(page, found)
    for name in set(TABLES) - {"near"}:
        before, after = (_table(text, name) for text in (PAGE.read_text(), page.read_text()))
        assert NOTHING in before and before != after


def _table(text: str, name: str) -> str:
    return text.split(f"<!-- gpu: {name} -->")[1].split("<!-- gpu: end -->")[0]
