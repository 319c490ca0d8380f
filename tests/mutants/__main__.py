"""Every mutant is made in a copy of the package, never in the checkout, and its tests run there.

It is killed if one of them fails. Exit status 1 if the tests fail without a mutant, if a mutant no longer applies or
runs, or if more than two survive.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from . import MUTANTS
from .mutant import Mutant
from .run import copy_to, run_tests

SURVIVORS = 2  # so many may
TIMEOUT = 600  # seconds; a mutant that hangs a test is found too
KILLED, SURVIVED, STALE, BROKEN = "killed", "survived", "does not apply", "does not run"


def judge(folder: Path, mutant: Mutant) -> tuple[str, str]:
    """(verdict, what shows it)"""
    path = folder / "vis_sparse" / mutant.file
    source = path.read_text()
    try:
        path.write_text(mutant.apply(source))
        status, output = run_tests(folder, mutant.tests, TIMEOUT)
    except ValueError as error:
        return STALE, str(error)
    finally:
        path.write_text(source)
    if status is None:
        return KILLED, f"no answer in {TIMEOUT} s"
    if status == 1:
        found = re.search(r"^(?:FAILED|ERROR) tests/(.*?)(?: - |$)", output, re.MULTILINE)
        return KILLED, found.group(1) if found else ""
    return (SURVIVED, ", ".join(mutant.tests)) if status == 0 else (BROKEN, f"exit status {status}: {output[-500:]}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="names and files of the mutants")
    parser.add_argument("--only", metavar="NAME", action="append", help="those whose name or file holds NAME")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time, each in its own copy")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not options.only or any(each in m.name or each in m.file for each in options.only)]
    if options.list or not chosen:
        print("\n".join(f"{mutant.file}: {mutant.name}" for mutant in chosen) or "no such mutant")
        return not chosen
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folders = SimpleQueue()
        for number in range(options.jobs):
            folders.put(copy_to(Path(temporary, str(number))))

        def in_turn(mutant: Mutant) -> tuple[str, str]:
            folder = folders.get()
            try:
                return judge(folder, mutant)
            finally:
                folders.put(folder)

        print(f"the tests of {len(chosen)} mutants, without any", flush=True)
        folder = folders.get()
        status, output = run_tests(folder, sorted({test for mutant in chosen for test in mutant.tests}))
        folders.put(folder)
        if status != 0:
            print(output)
            return 1
        verdicts = Counter()
        with ThreadPoolExecutor(options.jobs) as pool:
            for mutant, (verdict, shown) in zip(chosen, pool.map(in_turn, chosen)):
                verdicts[verdict] += 1
                print(f"{verdict:14}  {mutant.file}: {mutant.name}\n{'':16}{shown}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    return int(verdicts[SURVIVED] > SURVIVORS or verdicts[STALE] + verdicts[BROKEN] > 0)


if __name__ == "__main__":
    sys.exit(main())
