"""`python -m vis_sparse.eval.gpu`: run, tables, and the parts that have no command of their own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vis_sparse.eval.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("run", help="every part, on a GPU")
    whole.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of logs and results.json")
    whole.add_argument("--dry", action="store_true", help="tiny sizes on a CPU: whether the run itself runs")
    whole.add_argument("--only", metavar="A,B,...", help="these parts")
    written = commands.add_parser("tables", help="write the tables of docs/kernels.md")
    written.add_argument("results", type=Path, nargs="?", help="results.json of a run; without it nothing is measured")
    written.add_argument("--page", type=Path, default=Path("docs/kernels.md"))
    for name in ("ceilings", "pieces"):
        part = commands.add_parser(name, help="one part")
        part.add_argument("--device", default="cuda")
        part.add_argument("--dry", action="store_true")
        part.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.command == "run":
        from .run import run

        found = run(chosen.out, chosen.dry, chosen.only.split(",") if chosen.only else None)
        print(f"results: {chosen.out / 'results.json'}")
        raise SystemExit(any(part["rc"] != 0 for part in found["parts"].values()))
    if chosen.command == "tables":
        from .tables import write_tables

        write_tables(chosen.page, json.loads(chosen.results.read_text()) if chosen.results else None)
        return
    from .ceilings import ceilings
    from .pieces import pieces

    found = {"ceilings": ceilings, "pieces": pieces}[chosen.command](chosen.device, chosen.dry)
    text = json.dumps(found, indent=1)
    print(text)
    if chosen.json:
        chosen.json.write_text(text)


if __name__ == "__main__":
    main()
