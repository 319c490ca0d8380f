"""`make results`: all shipped plans and their peers on tasks for the shipped models, by lmms-eval.

`python -m vis_sparse.eval.results --out FOLDER` runs `vis-sparse eval` for each model, resumable, and writes the
tables into docs/results.md between two marks, and `report.html` into FOLDER.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from ..cost.flops import flops
from ..cost.shape_lookup import load_shape
from ..plans.plan import VisualPlan
from ..plans.scores import Calibration
from .lmms.run import Settings, evaluate
from .lmms.tables import write_tables
from .report_page import page
from .tables import measured_on
from .tiny import checkpoint

SHIPPED = (
    "dense", "auto", "hollow", "vskip", "shortv", "vtw", "vica", "yopo-25", "yopo-12", "pyramiddrop",
)  # fmt: skip
TASKS = {
    "llava": ["easy_vqa", "digit_grid", "digit_grid_turns"],
    "qwen2_vl": ["easy_vqa_framed", "digit_grid_framed"],
    "internvl": ["easy_vqa_tiled", "digit_grid_tiled"],
}
SHRUNK = {"qwen2_vl": ("half", "quarter")}  # the plainest baseline, where images need not be of one size
# Token pruning at equal shares of the visual FLOPs, with the layers that it keeps whole there.
BUDGETS = {0.5: 2, 0.25: 1}
ORDERS = {"fastv": "attention", "random": "random", "stride": "stride"}
# a typical prompt of the tasks: pixels of the image, tokens of text
IMAGES, TEXT = {"llava": (96, 96), "qwen2_vl": (96, 96), "internvl": (96, 192)}, 14
PAIRED = 64  # samples of each task timed under the plan and unpatched
TURNS = {"exact_match": "turns", "first_turn": "turn 1", "later_turns": "turns 2-4"}
START, END = "<!-- results: written by make results -->", "<!-- end of results -->"


def pruned(family: str) -> Iterator[VisualPlan]:
    """Plans that drop tokens, as many as spend at most a budget: FastV's order, a random one, a regular sub-grid."""
    shape = load_shape(checkpoint(family))

    def spent(plan: VisualPlan | str) -> int:
        return flops(shape, plan, image_size=IMAGES[family], text_tokens=TEXT, text_before=2).prefill.lane("visual")

    dense = spent("dense")
    for budget, after in BUDGETS.items():
        for name, by in ORDERS.items():
            plans = (VisualPlan.fastv(shape.layers, after, share / 100, by) for share in range(1, 100))
            affordable = [plan for plan in plans if spent(plan) <= budget * dense]
            yield affordable[-1].replace(name=f"{name}-{budget:.0%}".removesuffix("%"))


def measure(family: str, limit: int, out: Path) -> list[dict]:
    """Rows of lmms-eval for every plan, kept in `out` so that a second call goes on."""
    out.mkdir(parents=True, exist_ok=True)
    plans = list(SHIPPED)
    for plan in pruned(family):
        plans.append(str(out / f"{plan.name}.yaml"))
        Path(plans[-1]).write_text(plan.to_yaml(), encoding="utf-8")
    folder = checkpoint(family)
    settings = Settings(
        str(folder), limit, calibration=str(folder / "heads.safetensors"), paired=PAIRED, base="llava_hf"
    )

    def told(task: str, plan: str, is_known: bool) -> None:
        print(f"{family}: {plan} on {task}{' (kept)' if is_known else ''}", flush=True)

    rows = evaluate(settings, plans, TASKS[family], out, told)
    for share in SHRUNK.get(family, ()):
        tasks = [task.replace("framed", share) for task in TASKS[family]]
        rows += shrunk(evaluate(settings, ["dense"], tasks, out, told), rows, share)
    write_tables(rows, out)
    return rows


def shrunk(rows: list[dict], full: list[dict], share: str) -> list[dict]:
    """Rows of the dense model on shrunk images as those of a plan `image-<share>`, with the costs of full images."""
    dense = {row["task"]: row for row in full if row["plan"] == "dense"}
    renamed = []
    for row in rows:
        beside = dense[row["task"].replace(share, "framed")]
        costs = {name: beside[name] for name in ("task", "gflops_dense", "kv_mib_dense")}
        renamed.append(row | costs | {"plan": f"image-{share}", "same_as_dense": None})
    return renamed


def table(rows: list[dict]) -> str:
    """Markdown: a line a plan with its costs, means over the tasks of single questions, and its score in each task."""
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    lines = ["| plan | FLOPs | KV cache | speed-up | " + " | ".join(_heading(*column) for column in columns) + " |"]
    lines.append("| --- |" + " --- |" * (3 + len(columns)))
    for name in dict.fromkeys(row["plan"] for row in rows):
        own = {(row["task"], row["metric"]): row for row in rows if row["plan"] == name}
        single = [row for (_, metric), row in own.items() if metric == "exact_match" and "turns" not in row["task"]]
        speedups = [row["speedup"] for row in single if row["speedup"] is not None]
        cells = [
            name,
            *(f"{_mean(single, part) / _mean(single, f'{part}_dense'):.0%}" for part in ("gflops", "kv_mib")),
            f"{sum(speedups) / len(speedups):.2f}" if speedups else "1" if name == "dense" else "",
            *(f"{100 * own[column]['value']:.1f}" if column in own else "" for column in columns),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _heading(task: str, metric: str) -> str:
    if "turns" in task:
        return TURNS[metric]
    return task.removeprefix("digit_grid_").replace("framed", "").replace("tiled", "").strip("_")


def _mean(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def section(results: dict[str, list[dict]]) -> str:
    """What stands between the marks: a table a model, and where and when it was measured."""
    parts = []
    for rows in results.values():
        first = rows[0]
        parts.append(
            f"**{first['model']}**, {first['samples']} samples of each task; {measured_on(first)}:\n\n{table(rows)}"
        )
    return "\n\n".join(parts)


def insert(markdown: str, text: str) -> str:
    """`markdown` with `text` between the marks. Raises ValueError if they are not there."""
    if START not in markdown or END not in markdown:
        raise ValueError(f"page: expected the marks {START!r} and {END!r}")
    before, after = markdown[: markdown.index(START)], markdown[markdown.index(END) :]
    return f"{before}{START}\n{text}\n{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/results"), metavar="FOLDER")
    parser.add_argument("--limit", type=int, default=300, help="samples of each task")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), metavar="FILE", help="with the marks")
    given = parser.parse_args()
    results = {family: measure(family, given.limit, given.out / family) for family in TASKS}
    rows = [row for own in results.values() for row in own]
    (given.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    kinds = {"eval": rows, "bench": [], "peers": []}
    maps = [Calibration.load(checkpoint(family) / "heads.safetensors") for family in TASKS]
    (given.out / "report.html").write_text(page(kinds, maps), encoding="utf-8")
    given.page.write_text(insert(given.page.read_text(encoding="utf-8"), section(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
