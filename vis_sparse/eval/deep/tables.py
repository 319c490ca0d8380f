"""Writes the tables of the deep model's pages from what `front` measured: `python -m vis_sparse.eval.deep.tables`."""

import json
from pathlib import Path

from vis_sparse.eval.deep.front import BLIND, DENSE
from vis_sparse.eval.tiny.smol_files import SHIPPED_FOLDER

DOCS = Path("docs")
SCORES, FRONT = DOCS / "assets" / "deep_scores.json", DOCS / "assets" / "deep_front.json"
START, END = "<!-- {}: written by python -m vis_sparse.eval.deep.tables -->", "<!-- end of {} -->"
ASKED = {
    "easy_vqa": '"is there not a blue shape?"',
    "place": '"which digit is at the top left?"',
    "count": '"how often does the digit three appear?"',
    "exists": '"is there a seven?"',
    "reading": '"what does the second line say?"',
    "which_line": '"which line says river?"',
    "lines": '"how many lines are there?"',
    "first": "first turns of conversations of four",
    "later": "their later turns",
    "leaning": 'of those, the ones that lean on a turn before: "and the line below it?"',
    "description": '"describe the picture.", every word of the sentence',
}
COLUMNS = ("easy_vqa", "place", "count", "exists", "reading", "first", "later")


def scores(rows: list[dict]) -> str:
    """Dense beside blind, a row a kind."""
    by_plan = {row["plan"]: row["kinds"] for row in rows}
    lines = ["| kind | question | right | blind | questions |", "| --- | --- | --- | --- | --- |"]
    for kind, text in ASKED.items():
        dense, blind = by_plan[DENSE].get(kind), by_plan[BLIND].get(kind)
        if dense:
            right, guessed = (f"{100 * row['right']:.1f} %" for row in (dense, blind))
            lines.append(f"| {kind} | {text} | {right} | {guessed} | {dense['questions']:,} |")
    return "\n".join(lines)


def front(rows: list[dict]) -> str:
    """A row a plan, the dearest first."""
    lines = [f"| plan | visual FLOPs | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for row in sorted(rows, key=lambda row: -row["visual_flops"]):
        values = [f"{100 * row['kinds'][kind]['right']:.1f}" for kind in COLUMNS]
        lines.append(f"| `{row['plan']}` | {100 * row['visual_flops']:.1f} % | {' | '.join(values)} |")
    return "\n".join(lines)


def put(page: Path, name: str, table: str) -> None:
    """Between the page's markers of that name."""
    text, start, end = page.read_text(encoding="utf-8"), START.format(name), END.format(name)
    before, rest = text.split(start)
    page.write_text(f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    measured = json.loads(SCORES.read_text())
    for page in (DOCS / "deep.md", SHIPPED_FOLDER / "README.md"):
        put(page, "scores", scores(measured))
    put(DOCS / "deep.md", "front", front(measured + json.loads(FRONT.read_text())))
