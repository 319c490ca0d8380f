"""The shipped plans, plans from files, and whatever a caller gives as a plan."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .atomic_write import is_file
from .layer_plan import PlanError, brief
from .plan import PlanRecipe, VisualPlan, read_recipe

CONFIGS = Path(__file__).parents[1] / "configs"


def plan_names() -> list[str]:
    """Names of the shipped plans."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_plan(source: str | Path) -> PlanRecipe:
    """The plan called `source` in `configs/`, or the YAML file at that path.

    A recipe fits any depth: `patch` and `flops` take it as it is, `.resolve(num_layers)` gives the `VisualPlan`.
    """
    if not isinstance(source, str | Path):
        raise PlanError(f"plan: got {brief(source)}, expected a file or one of {', '.join(plan_names())}")
    if str(source) in plan_names():
        return read_recipe(CONFIGS / f"{source}.yaml")
    if is_file(source):
        return read_recipe(Path(source))
    near = difflib.get_close_matches(str(source), plan_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise PlanError(f"plan: got {brief(str(source))}, expected a file or one of {', '.join(plan_names())}{hint}")


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
