"""What README and docs promise: their commands and examples run as they stand, or at least say nothing wrong.

docs/development.md tells writers how a block is fenced. `bash` runs line by line in a folder that looks like the root
of a checkout, one folder a page, so that a later command reads what an earlier one wrote; expensive ones in the quick
form of `QUICK`. `python` runs as a file of its own, in its turn. `console`, `python notest` and commands within the
text are not run, but what they name has to exist: commands, options, make targets, extras, modules, test paths,
markers, and names imported from the package.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

import vis_sparse
from vis_sparse.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/*.md"), *ROOT.glob("docs/**/*.md")]
# what a command that runs in a test gets behind its own arguments, so that it is over in seconds
QUICK = {
    "vis-sparse": None,  # `vis-sparse --help`, `--version`
    "vis-sparse bench": "--layers 1 --repeats 1",
    "vis-sparse bench --train": "--model qwen2-vl-2b --text-tokens 16 --layers 3 --repeats 1",
    "vis-sparse bench calibration": "--layers 1 --samples 1 --repeats 1",
    "vis-sparse bench kernels": "--settings 24x24 --most-heads 1 --repeats 1",
    "vis-sparse calibrate": "--samples 8",
    "vis-sparse demo": "--questions 4",
    "vis-sparse doctor": None,
    "vis-sparse eval": "--limit 2 --timed 0",
    "vis-sparse finetune": "--steps 2 --batch 1",
    "vis-sparse fit": "--samples 8",
    "vis-sparse flops": None,
    "vis-sparse plan": None,
    "vis-sparse report": None,
    "vis-sparse search": "--samples 4 --time-limit 1s",
    "lmms-eval": "--limit 2",
    "mkdir": None,
    "python -m vis_sparse.eval.conversations": "--train 4 --held-out 2",
    "printf": None,
}
SLOW = {"bench", "calibrate", "demo", "eval", "finetune", "fit", "lmms-eval", "search"}
SHOWN = {"vis_sparse", "examples", "tests", "docs"}  # folders of a checkout that commands may name


class Block(NamedTuple):
    """A fenced block: its language, the rest of its info string, its text without the page's indentation, its line."""

    language: str
    info: str
    text: str
    line: int

    def commands(self) -> list[str]:
        """Whole commands, continuations joined, comments and prompts gone."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):  # the others are output
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def blocks(page: Path) -> list[Block]:
    found, opened = [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.match(r"( *)(`{3,})\s*([\w-]*)(.*)", line)
        if opened is None and fence:
            opened, lines = (*fence.groups(), number), []
        elif opened is not None and line.strip() == opened[1]:
            indent, _, language, info, start = opened
            found.append(Block(language, info.strip(), "\n".join(text[len(indent) :] for text in lines), start))
            opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"{page.name}: the block of line {opened[-1]} does not end"
    return found


def inline(page: Path) -> list[str]:
    """Commands in the text: `like this`."""
    text = re.sub(r"^ *(`{3,}).*?^ *\1 *$", "", page.read_text(), flags=re.S | re.M)
    spans = (" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))
    return [span for span in spans if re.match(r"(vis-sparse|make|pip install|python -m) [\w.'-]", span)]


def words(command: str) -> list[str]:
    """A command's words; programs of a virtual environment by their names."""
    split = shlex.split(command)
    while split and re.fullmatch(r"\w+=\S*", split[0]):  # set for this command only
        split = split[1:]
    return [re.sub(r"^\.venv/bin/", "", split[0]), *split[1:]] if split else []


def quick_form(command: str) -> tuple[str, ...] | None:
    """The words that `QUICK` adds to a command; None if the table does not know it."""
    split = words(command)
    names = [" ".join(split[:count]) for count in (3, 2)] + [split[0] if len(split) < 2 or split[1][0] == "-" else ""]
    names += split[:1] if split[0] != "vis-sparse" else []
    known = next((name for name in names if name in QUICK), None)
    return None if known is None else tuple((QUICK[known] or "").split())


def is_example(command: str) -> bool:
    """`python examples/NAME.py`: run by tests/test_examples.py."""
    return bool(re.fullmatch(r"python3? examples/\w+\.py", command))


def is_slow(page: Path) -> bool:
    commands = (command for block in blocks(page) if block.language == "bash" for command in block.commands())
    return any(SLOW.intersection(words(command)[:2]) for command in commands)


def of(pages) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty folder that looks like a checkout, with caches of its own; no network."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in SHOWN:
        (root / name).symlink_to(ROOT / name)
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    for name in ("HF_HOME", "LMMS_EVAL_DATASETS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    return root


def run_command(command: str) -> None:
    added = quick_form(command)
    assert added is not None, f"{command}: no command that tests know how to run; add it to QUICK, or fence it console"
    split = words(command)
    if split[0] == "vis-sparse" and not set("|><$;&`") & set(command):
        done = CliRunner().invoke(app, [*split[1:], *added])
        assert done.exit_code == 0, f"{command}\n{done.output[-3000:]}\n{done.exception!r}"
    else:
        whole = " ".join([command, *added])
        done = subprocess.run(["bash", "-c", whole], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"


def page_params() -> list:
    run = [page for page in PAGES if any(block.language == "bash" or is_run(block) for block in blocks(page))]
    marks = [(pytest.mark.slow,) if is_slow(page) else () for page in run]
    return [pytest.param(page, id=str(page.relative_to(ROOT)), marks=mark) for page, mark in zip(run, marks)]


def is_run(block: Block) -> bool:
    return block.language == "python" and "notest" not in block.info


@pytest.mark.parametrize("page", page_params())
def test_commands_and_python_run(page, checkout):
    for block in blocks(page):
        if is_run(block):
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, {"__name__": "__main__"})
        elif block.language == "bash":
            for command in block.commands():
                if words(command)[0] in ("make", "pip") or is_example(command):
                    check(command)
                else:
                    run_command(command)
    assert {path.name for path in checkout.iterdir()} - SHOWN <= {"out"}, "what pages write goes under out/"


@pytest.mark.parametrize("page", of(PAGES))
def test_what_is_not_run_names_what_there_is(page):
    for block in blocks(page):
        if block.language == "python":
            check_python(block.text)
        elif block.language == "console":
            for command in block.commands():
                check(command)
    for command in inline(page):
        check(command, is_whole=False)


def test_blocks_have_a_language():
    known = {"bash", "console", "python", "yaml", "text", "json", "bibtex"}
    for page in PAGES:
        for block in blocks(page):
            assert block.language in known, f"{page.name}, line {block.line}: got {block.language!r}, expected {known}"


def test_tables_of_this_file_are_true():
    """QUICK names every command of the program, and those only; there are pages, and blocks of each kind in them."""
    program = typer.main.get_command(app)
    named = {name.removeprefix("vis-sparse ").partition(" --")[0] for name in QUICK if name.startswith("vis-sparse ")}
    groups = {f"{name} {sub}" for name, command in program.commands.items() for sub in getattr(command, "commands", ())}
    assert named <= set(program.commands) | groups
    assert set(program.commands) - named == {"convert-internvl2"}  # needs a checkpoint from the hub
    seen = {block.language for page in PAGES for block in blocks(page)}
    assert {"bash", "console", "python"} <= seen
    assert "docs/kernels.md" in {str(page.relative_to(ROOT)) for page in PAGES}


@pytest.mark.parametrize(
    "command",
    [
        "vis-sparse serach --model M",
        "vis-sparse flops --plans auto",
        "vis-sparse calibrate --model M --data D --out F --samples many",
        "vis-sparse calibrate --model M",  # what has to be there is missing
        ".venv/bin/python -m vis_sparse plan shows auto",
        "make no-such-target",
        "pip install 'vis_sparse[everything]'",
        "python -m pytest -m no_such_marker",
        "python -m pytest tests/no_such_folder",
        "python -m vis_sparse.eval.nothing",
        "python -m vis_sparse.eval.comparison --no-such-option",
        "python examples/no_such_example.py",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises(AssertionError):
        check(command)


@pytest.mark.parametrize(
    "command", ["vis-sparse plan show no-such-plan", "printf x > no/such/folder", "unknown --help"]
)
def test_a_command_that_fails_is_found(command, checkout):
    with pytest.raises(AssertionError):
        run_command(command)


@pytest.mark.parametrize("text", ["from vis_sparse.plans import nothing", "import vis_sparse\nvis_sparse.nothing()"])
def test_a_wrong_name_is_found(text):
    with pytest.raises((AssertionError, ImportError)):
        check_python(text)


# What a command names has to exist. `is_whole=False`: a command within the text may leave out what it needs.


def check(command: str, is_whole: bool = True) -> None:
    if not re.match(r"(\w+=\S+ )*(\.venv/bin/)?(vis-sparse|make|pip|pytest|python3?|accelerate launch)( |$)", command):
        return  # output, or a program of others
    split = words(command)
    if split[:2] == ["accelerate", "launch"]:
        split = ["python", *split[split.index("-m") :]]
    if split[:3] == ["python", "-m", "vis_sparse"]:
        split = ["vis-sparse", *split[3:]]
    if split[0] == "vis-sparse":
        check_options(command, split[1:], is_whole)
    elif split[0] == "make":
        done = subprocess.run(["make", "--dry-run", *split[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    elif "pip" in split[:3] and "install" in split:
        for extras in re.findall(r"\[([\w,-]+)\]", command):
            assert set(extras.split(",")) <= extras_of_setup(), f"{command}: expected extras of {extras_of_setup()}"
    elif split[:2] == ["python", "-m"] and split[2] == "pytest" or split[0] == "pytest":
        check_pytest(command, split)
    elif split[:2] == ["python", "-m"]:
        check_module(command, split[2], split[3:])
    elif split[0] == "python" and split[1:] and not split[1].startswith("-"):
        assert (ROOT / split[1]).is_file(), f"{command}: no such file"


def check_options(command: str, arguments: list[str], is_whole: bool) -> None:
    program, refusal = typer.main.get_command(app), io.StringIO()
    disarm(program)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(refusal):
            code = program.main(arguments, prog_name="vis-sparse", standalone_mode=False)
    except Exception as error:  # typer carries click within itself: its errors cannot be imported
        assert type(error).__name__ == "NoArgsIsHelpError", f"{command}: {error}"
        code = 2
    is_part = "Missing" in refusal.getvalue() or not refusal.getvalue()
    assert not code or is_part and not is_whole, f"{command}: {refusal.getvalue()}"


def disarm(command) -> None:
    """Let the program parse its arguments, and do nothing."""
    if command.callback is not None:
        command.callback = lambda **arguments: None
    for part in getattr(command, "commands", {}).values():
        disarm(part)


def extras_of_setup() -> set[str]:
    calls = (node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword))
    return {key.value for node in calls if node.arg == "extras_require" for key in node.value.keys}


def check_pytest(command: str, split: list[str]) -> None:
    markers = (ROOT / "pyproject.toml").read_text() + (ROOT / "tests" / "kernels" / "conftest.py").read_text()
    rest = split[split.index("pytest") + 1 :]
    for flag, value in zip(["", *rest], rest):
        if flag == "-m":
            assert f'"{value.removeprefix("not ")}:' in markers, f"{command}: no such marker"
        elif value.startswith("tests"):
            assert (ROOT / value.split("::")[0]).exists(), f"{command}: no such path"


def check_module(command: str, module: str, arguments: list[str]) -> None:
    if module.split(".")[0] not in SHOWN:
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{command}: no such module"
    file = Path(spec.origin)
    source = (file.with_name("__main__.py") if file.name == "__init__.py" else file).read_text()
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{option.split("=")[0]}"' in source, f"{command}: {module} has no option {option}"


def check_python(text: str) -> None:
    for node in ast.walk(compile(text, "block", "exec", ast.PyCF_ONLY_AST)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "vis_sparse":
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vis_sparse":
            assert hasattr(vis_sparse, node.attr), f"vis_sparse.{node.attr}: no such name"
