"""Results as Markdown: scores of all plans, and plans against their rivals question by question."""

from __future__ import annotations

from collections.abc import Iterable

from .answers import SCORED

LEVEL = 0.05


def scores(rows: Iterable[dict]) -> str:
    """One line a plan: share of the dense visual FLOPs, right answers in per cent, KL."""
    lines = _head("plan", "visual FLOPs", *SCORED, "KL")
    for row in rows:
        right = (f"{100 * row[kind]:.1f}" for kind in SCORED)
        lines.append(_line(row["plan"], f"{row['cost']:.1%}", *right, f"{row['kl']:.4f}"))
    return "\n".join(lines) + "\n"


def pairs(rows: list[dict]) -> str:
    """One line a rival: by kind, questions that only our plan answers right : only the rival, and p where they differ.

    An arrow points to the plan that is ahead at p < 0.05: < ours, > the rival; doubled if it is ahead after Holm's
    correction too.
    """
    lines = _head("plan", "rival", *SCORED)
    cells = {(row["plan"], row["rival"], row["kind"]): _cell(row) for row in rows}
    for plan, rival in dict.fromkeys((row["plan"], row["rival"]) for row in rows):
        lines.append(_line(plan, rival, *(cells[plan, rival, kind] for kind in SCORED)))
    return "\n".join(lines) + "\n"


def _cell(row: dict) -> str:
    ours, theirs = row["only_plan"], row["only_rival"]
    arrow = "<" if ours > theirs else ">"
    mark = "" if row["p"] >= LEVEL else f" {arrow * (1 + (row['p_holm'] < LEVEL))}"
    return f"{ours} : {theirs}" + (f", p {row['p']:.2g}" if ours != theirs else "") + mark


def _head(*names: str) -> list[str]:
    return [_line(*names), _line(*["---"] * len(names))]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
