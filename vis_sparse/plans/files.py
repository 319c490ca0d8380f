"""The shipped plans, plans from files, and whatever a caller gives as a plan."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .atomic_write import is_file
from .carried import ADAPTER_FILE, plans_of_file, plans_of_folder
from .hub import hub_file, is_hub_id
from .layer_plan import PlanError, brief
from .plan import PlanRecipe, VisualPlan, read_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
PLAN_FILE = "plan.yaml"  # of a repository or folder that holds a plan


def plan_names() -> list[str]:
    """Names of the shipped plans."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_plan(source: str | Path) -> PlanRecipe:
    """The plan called `source` in `configs/`, the YAML file at that path, or the plan of a folder or of a repository
    of the Hub (OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:FILE): its plan.yaml, or what its checkpoint carries.

    "NAME+2", of any of these: with the first 2 layers whole, for visual tokens are changed most there
    (`PlanRecipe.whole_first`). A recipe fits any depth: `patch` and `flops` take it as it is, `.resolve(num_layers)`
    gives the `VisualPlan`.
    """
    if not isinstance(source, str | Path):
        raise PlanError(f"plan: got {brief(source)}, expected a file or one of {', '.join(plan_names())}")
    if str(source) in plan_names():
        return read_recipe(CONFIGS / f"{source}.yaml")
    if is_file(source):
        return _of_file(Path(source))
    whole = re.fullmatch(r"(.+)\+([1-9][0-9]{,4})", str(source))
    if whole is not None:
        return load_plan(whole[1]).whole_first(int(whole[2]))
    if is_hub_id(source):
        return _of_file(hub_file(source, (PLAN_FILE, ADAPTER_FILE, "config.json"), "plan"))
    if _is_folder(source):
        return _of_folder(Path(source))
    near = difflib.get_close_matches(str(source), plan_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise PlanError(f"plan: got {brief(str(source))}, expected a file or one of {', '.join(plan_names())}{hint}")


def _of_file(file: Path) -> PlanRecipe:
    if file.suffix != ".json":
        return read_recipe(file)
    plans = plans_of_file(file)
    if plans is None:
        raise PlanError(f"plan: got {str(file)!r} without a vis_sparse block, expected one of a patched model")
    return next(iter(plans.values())).as_recipe()


def _of_folder(folder: Path) -> PlanRecipe:
    if is_file(folder / PLAN_FILE):
        return read_recipe(folder / PLAN_FILE)
    plans = plans_of_folder(folder)
    if plans is None:
        raise PlanError(
            f"plan: got the folder {brief(str(folder))} without a plan, expected {PLAN_FILE} in it, or a checkpoint "
            "that was saved from a patched model"
        )
    return next(iter(plans.values())).as_recipe()


def _is_folder(source: str | Path) -> bool:
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):  # names that nothing can have
        return False


def shown_names(plans: Iterable[str]) -> dict[str, str]:
    """What tables call plans (names or files): each by its own name; a file whose name another plan has, or a shipped
    one, with its stem behind it.

    Raises PlanError for two files of one name and one stem, or a plan that is not there.
    """
    own = {plan: load_plan(plan).name for plan in plans}
    bearers = Counter(own.values())
    taken = {*plan_names(), *(name for name, count in bearers.items() if count > 1)}
    shown = {
        plan: f"{name} ({Path(plan).stem})" if name in taken and plan != name else name for plan, name in own.items()
    }
    if len(set(shown.values())) < len(shown):
        raise PlanError(f"plan: got {', '.join(shown)}, expected plans of different names")
    return shown


def as_plan(source: VisualPlan | PlanRecipe | str | Path, num_layers: int) -> VisualPlan:
    """`source` (plan, recipe, shipped name or path) as a plan for `num_layers` decoder layers."""
    if isinstance(source, VisualPlan):
        return source
    if isinstance(source, PlanRecipe):
        return source.resolve(num_layers)
    if isinstance(source, str | Path):
        return load_plan(source).resolve(num_layers)
    raise PlanError(f"plan: got {type(source).__name__}, expected a VisualPlan, a recipe, a name or a path")
