"""Writes the tables of the deep model's pages from what `front` measured: `python -m vis_sparse.eval.deep.tables`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from vis_sparse.eval.comparison.paired import mcnemar, only_one_right
from vis_sparse.eval.deep.answers import Answers
from vis_sparse.eval.deep.front import BLIND, DENSE
from vis_sparse.eval.tiny.smol_files import SHIPPED_FOLDER
from vis_sparse.plans.files import plan_names

DOCS = Path("docs")
ANSWERS = DOCS / "assets" / "deep_answers.json"
START, END = "<!-- {}: written by python -m vis_sparse.eval.deep.tables -->", "<!-- end of {} -->"
ASKED = {
    "easy_vqa": '"is there not a blue shape?"',
    "place": '"which digit is at the top left?"',
    "count": '"how often does the digit three appear?"',
    "exists": '"is there a seven?"',
    "reading": '"what does the second line say?"',
    "which_line": '"which line says river?"',
    "lines": '"how many lines are there?"',
    "later": "second to fourth turns of conversations",
    "leaning": 'of those, the ones that lean on a turn before: "and the line below it?"',
    "description": '"describe the picture.", every word of the sentence',
}
SHORT = ("place", "count", "reading", "which_line", "later")  # README's, which has the default and cheap plans
CHEAP, DEFAULT = 0.5, "auto"
COLUMNS = ("easy_vqa", "place", "count", "exists", "reading", "which_line", "later", "description")
LEVEL = 0.05
FITTED = ", fitted"


def scores(answers: Answers) -> str:
    """Dense beside blind, a row a kind."""
    lines = ["| kind | question | right | blind | questions |", "| --- | --- | --- | --- | --- |"]
    for kind, text in ASKED.items():
        dense, blind = answers.of(DENSE, kind), answers.of(BLIND, kind)
        lines.append(f"| {kind} | {text} | {dense.mean():.1%} | {blind.mean():.1%} | {len(dense):,} |")
    return "\n".join(lines)


def front(answers: Answers, plans: Iterable[str], columns: Sequence[str]) -> str:
    """A row a plan, the dearest first: score, and points beside dense on the same questions."""
    lines = [f"| plan | visual FLOPs | questions | {' | '.join(columns)} |", "| --- " * (len(columns) + 3) + "|"]
    for plan in sorted(plans, key=lambda plan: -answers.visual_flops[plan]):
        cells = [cell(answers, plan, kind) for kind in columns]
        asked = f"{len(answers.right[plan]):,}"
        lines.append(f"| `{plan}` | {answers.visual_flops[plan]:.1%} | {asked} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(answers: Answers, plan: str, kind: str) -> str:
    own, dense = answers.of(plan, kind, DENSE), answers.of(DENSE, kind, plan)
    if plan == DENSE:
        return f"{100 * own.mean():.1f}"
    beyond_chance = "*" if mcnemar(*only_one_right(own, dense)) < LEVEL else ""
    return f"{100 * own.mean():.1f} ({100 * (own.mean() - dense.mean()):+.1f}{beyond_chance})"


def put(page: Path, name: str, table: str) -> None:
    """Between the page's markers of that name."""
    text, start, end = page.read_text(encoding="utf-8"), START.format(name), END.format(name)
    before, rest = text.split(start)
    page.write_text(f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    measured = Answers.load(ANSWERS)
    for page in (DOCS / "deep.md", SHIPPED_FOLDER / "README.md"):
        put(page, "scores", scores(measured))
    changed = {plan for plan in measured.right if "," in plan}  # the weights: fitted or trained
    put(DOCS / "deep.md", "front", front(measured, {*measured.right} - changed, COLUMNS))
    put(DOCS / "deep.md", "trained", front(measured, {DENSE, *changed}, COLUMNS))
    fitted = {plan for plan in changed if plan.endswith(FITTED)}
    bare = {plan.removesuffix(FITTED) for plan in fitted} & {*measured.right}
    put(DOCS / "fit.md", "fitted", front(measured, {DENSE, *fitted, *bare}, COLUMNS))
    cheap = {plan for plan in {*plan_names(), BLIND} & {*measured.right} if measured.visual_flops[plan] <= CHEAP}
    put(Path("README.md"), "front", front(measured, {DENSE, DEFAULT} | cheap | changed, SHORT))
