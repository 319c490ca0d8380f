"""The documentation as a site: builds strictly, fetches nothing, and its reference has every public name."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer

import vis_sparse
from vis_sparse.cli.main import app

ROOT = Path(__file__).parents[1]
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
pytestmark = pytest.mark.slow


class Elements(HTMLParser):
    """Ids of a page, and what it makes a browser fetch."""

    def __init__(self, page: Path):
        super().__init__()
        self.ids, self.fetched = set(), set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag in FETCHED and given.get(FETCHED[tag]):
            self.fetched.add(given[FETCHED[tag]])


def build(config: Path, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", site)
    assert done.returncode == 0, done.stderr[-3000:]
    return site


def test_every_page_is_built_and_fetches_nothing_from_elsewhere(site):
    for page in ROOT.glob("docs/*.md"):
        fetched = Elements(site / f"{page.stem}.html").fetched
        assert fetched and not [address for address in fetched if re.match(r"(https?:)?//", address)], page.name


def test_the_reference_has_every_public_name(site):
    ids = Elements(site / "api.html").ids
    defined = {name: f"vis_sparse.{module}.{name}" for name, module in vis_sparse._EXPORTS.items()}
    assert [name for name, anchor in defined.items() if anchor not in ids] == []


def test_the_command_line_page_has_every_command(site):
    ids = Elements(site / "cli.html").ids
    for name, command in typer.main.get_command(app).commands.items():
        assert f"vis-sparse-{name}" in ids
        assert all(f"vis-sparse-{name}-{sub}" in ids for sub in getattr(command, "commands", ()))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(page, site):
    links = re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    for target, anchor in links:
        assert (ROOT / target).exists(), target
        if anchor:
            assert anchor in Elements(site / f"{Path(target).stem}.html").ids, f"{target}#{anchor}"


def test_a_broken_link_fails(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[away](nowhere.md)\n")
    (tmp_path / "docs" / "hooks.py").write_text("")
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"\nnav:\n.*?\n\n", "\n\n", settings, flags=re.S))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1 and "nowhere.md" in done.stderr
