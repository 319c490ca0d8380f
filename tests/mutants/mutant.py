"""A mutant: one small change of the source, a fault that somebody could make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Mutant:
    """file: under vis_sparse/; before, after: text of the file, on one line or several; tests: node ids under tests/ of
    the few that should find it."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, source: str) -> str:
        """The changed source. Raises ValueError unless `before` stands there exactly once."""
        if (found := source.count(self.before)) != 1:
            raise ValueError(f"{self.name}: got {found} places in {self.file}, expected one of {self.before!r}")
        return source.replace(self.before, self.after)


def mutants(table) -> tuple[Mutant, ...]:
    """table: tuples of name, file, before, after, and the tests."""
    return tuple(Mutant(name, file, before, after, tuple(tests)) for name, file, before, after, *tests in table)


def oracle(*scenarios: str) -> tuple[str, ...]:
    """Random plans on grouped heads and on biases, in scenarios of `test_parity`."""
    return tuple(
        f"executor/test_parity.py::test_random_plan_is_the_oracle[{text}-{scenario}-{semantics}-torch]"
        for scenario in scenarios
        for text in ("llama-gqa", "llama-bias")
        for semantics in ("exclude", "zero")
    )


def dropping(plan: str, *scenarios: str) -> tuple[str, ...]:
    """A plan of `test_tokens` under which tokens leave, in scenarios of `test_parity`."""
    return tuple(f"executor/test_tokens.py::test_plans_are_the_oracle[{plan}-{each}-torch]" for each in scenarios)


def dense(*cells: str) -> tuple[str, ...]:
    """Cells of the parity table under the dense plan."""
    return tuple(f"patches/test_table.py::test_dense_plan_is_the_unpatched_model[{cell}]" for cell in cells)
