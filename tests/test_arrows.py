"""The house plan: which folder may import which, and that no circle is left, imports inside functions included."""

import ast
from pathlib import Path

import pytest

import vis_sparse

PACKAGE = Path(vis_sparse.__file__).parent
# Each folder may import itself and those before it. `cli` and `eval` hand results to people: nothing imports `cli`.
ORDER = (
    "plans", "layout", "kernels", "executor", "cost", "patches", "checkpoints", "calibration", "searching",
    "training", "serving", "eval", "cli",
)  # fmt: skip
PUBLIC = {"eval", "cli", "serving"}  # these may use the public face, `import vis_sparse`
FAMILY_WORDS = ("llava", "qwen", "internvl", "clip_vision", "siglip")


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package, "" for the package itself."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(name: str, file: Path, known) -> set[str]:
    """Modules of the package that `name` imports anywhere in its text."""
    here = name.split(".") if name else []
    package = here if file.name == "__init__.py" else here[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("vis_sparse").lstrip(".") for alias in node.names if _own(alias.name)}
        elif isinstance(node, ast.ImportFrom) and (node.level or _own(node.module)):
            base = package[: len(package) - node.level + 1] if node.level else []
            rest = (node.module or "").split(".") if node.level else node.module.split(".")[1:]
            module = ".".join([*base, *filter(None, rest)])
            submodules = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            found |= (submodules & set(known)) or {module}
    return found - {name}


def _own(module: str) -> bool:
    return module == "vis_sparse" or module.startswith("vis_sparse.")


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports_of(name, file, known) for name, file in known.items()}


def folder(module: str) -> str:
    return module.split(".")[0]


def test_the_root_has_no_module_of_its_own():
    assert {file.name for file in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {file.parent.name for file in PACKAGE.glob("*/*.py")}
    assert folders - {"configs"} <= set(ORDER)


def test_the_imports_that_are_read_are_the_real_ones(arrows):
    """That the test sees imports at all: some that there are, relative, absolute and inside functions."""
    assert "executor.lanes" in arrows["patches.state"]
    assert "kernels.triton_backend" in arrows["kernels"]
    assert "eval.tiny.data" in arrows["eval.tasks.tiny"]
    assert "cli.main" in arrows["__main__"]
    assert sum(map(len, arrows.values())) > 300


def test_nothing_points_up(arrows):
    wrong = [
        f"{name} -> {target or 'vis_sparse'}"
        for name, targets in arrows.items()
        if name not in ("", "__main__")
        for target in targets
        if not (target and ORDER.index(folder(target)) <= ORDER.index(folder(name)))
        and not (target == "" and folder(name) in PUBLIC)
    ]
    assert not wrong, wrong


def test_no_circle(arrows):
    """Modules in an order in which each imports only earlier ones. What the root hands on is looked up when asked."""
    left = {name: targets & set(arrows) - {""} for name, targets in arrows.items() if name}
    while left:
        free = {name for name, targets in left.items() if not targets & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}


def test_only_patches_know_families_by_name():
    """Below `patches` no family is named in code; `cost/shape_config.py` reads their configs."""
    below = ORDER[: ORDER.index("patches")]
    named = []
    for name, file in modules().items():
        if folder(name) in below and name != "cost.shape_config":
            tree = ast.parse(file.read_text())
            docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                word = node.value if isinstance(node, ast.Constant) and id(node) not in docs else ""
                word = node.id if isinstance(node, ast.Name) else word
                if isinstance(word, str) and any(family in word.lower() for family in FAMILY_WORDS):
                    named.append(f"{name}: {word}")
    assert not named, named


def test_nothing_below_the_executor_knows_transformers():
    below = ORDER[: ORDER.index("executor")]
    for name, file in modules().items():
        if folder(name) in below:
            for node in ast.walk(ast.parse(file.read_text())):
                found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(each.split(".")[0] == "transformers" for each in found), name


def test_no_long_files():
    long = {str(file.relative_to(PACKAGE)): count for file in PACKAGE.rglob("*.py") if (count := _lines(file)) > 450}
    assert not long, long


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines())
