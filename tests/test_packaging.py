"""The package as its users get it: what is in the wheel, what type checkers see, and files that repeat each other."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import vis_sparse
from vis_sparse.searching.search import Settings

from .installed import try_package

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def imports_for_type_checkers() -> dict[str, str]:
    """{public name: module} of the imports that only type checkers see."""
    tree = ast.parse(Path(vis_sparse.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name}: only `X as X` is handed on to users"
            found[alias.name] = node.module
    return found


def test_type_checkers_see_the_names_that_there_are(imports_for_type_checkers):
    assert imports_for_type_checkers == vis_sparse._EXPORTS
    assert set(vis_sparse.__all__) == set(vis_sparse._EXPORTS) <= set(dir(vis_sparse))
    for name in vis_sparse.__all__:
        assert getattr(vis_sparse, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        vis_sparse.pach  # noqa: B018


def test_no_public_name_is_left_out_of_the_file_that_is_type_checked():
    text = (ROOT / "tests" / "typing" / "public_face.py").read_text()
    assert [name for name in vis_sparse.__all__ if not re.search(rf"\bvis_sparse\.{name}\b", text)] == []


def test_the_settings_of_search_are_those_of_search_front():
    search, front = (inspect.signature(getattr(vis_sparse, name)).parameters for name in ("search", "search_front"))
    typed = {name: str(front[name].annotation) for name in front if name not in search}
    assert typed == {name: kind.__forward_arg__ for name, kind in Settings.__annotations__.items()}


@pytest.mark.slow
def test_pyright_finds_nothing_in_a_users_file():
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "tests/typing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_public_face_is_fully_typed():
    """Every public name, and every public method and field of the public classes, has a type."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    command += ["--verifytypes", "vis_sparse", "--ignoreexternal", "--outputjson"]
    path = os.environ | {"PYTHONPATH": str(ROOT)}  # an editable install is a hook that pyright does not run
    done = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)
    found = json.loads(done.stdout)["typeCompleteness"]
    classes = {f"vis_sparse.{module}.{name}" for name, module in vis_sparse._EXPORTS.items() if name[0].isupper()}
    public = [
        symbol
        for symbol in found["symbols"]
        for name in {symbol["name"], *symbol.get("alternateNames", ())}
        if name.removeprefix("vis_sparse.") in vis_sparse._EXPORTS or name.rpartition(".")[0] in classes
    ]
    assert len(public) > 100
    wrong = {symbol["name"]: symbol["diagnostics"] for symbol in public if not symbol["isTypeKnown"]}
    assert not wrong, wrong
    print(f"\nverifytypes: {len(public)} public symbols known; whole package {found['completenessScore']:.1%}")


@pytest.mark.slow
def test_the_built_packages_hold_what_is_needed_and_work(tmp_path):
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel, sdist = (next((tmp_path / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=True, capture_output=True)
    package = {file.relative_to(ROOT).as_posix() for file in (ROOT / "vis_sparse").rglob("*") if file.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == package
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt"}
    assert needed | package | {"tests/models.py", "docs/kernels.md"} <= in_sdist
    assert not any("__pycache__" in name or name.startswith((".", "out/")) for name in in_sdist)
    try_package(wheel, tmp_path)


def test_the_citation_is_that_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    readme = (ROOT / "README.md").read_text()
    authors = re.search(r"author\s*=\s*\{(.+?)\}", readme, re.DOTALL)[1]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert names == re.split(r"\s+and\s+", authors)
    assert paper["title"] == re.search(r"title\s*=\s*\{(.+?)\}", readme)[1]
    assert paper["identifiers"][0]["value"] == "arXiv:2410.06169"


def test_the_changelog_has_a_section_for_this_version():
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    in_work = ".dev" in vis_sparse.__version__
    assert sections[0] == ("Unreleased" if in_work else vis_sparse.__version__)


def test_einops_stays_off_the_path_of_a_call():
    """It makes a change of shape readable where data are made or checked; parsing patterns is host time in a call."""
    users = {
        file.relative_to(ROOT / "vis_sparse").as_posix()
        for file in (ROOT / "vis_sparse").rglob("*.py")
        if re.search(r"^\s*(from|import) einops\b", file.read_text(), re.MULTILINE)
    }
    folders = {name.split("/")[0] for name in users - {"kernels/reference.py"}}
    assert "kernels/reference.py" in users and folders == {"calibration", "checkpoints", "eval"}
