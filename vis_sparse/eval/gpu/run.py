"""Runs the parts one after the other, each within its limit and all within nine minutes, and joins what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .parts import MINUTES, Part, parts

_TAIL = 4000  # characters of a log that are kept with the results


def run(folder: Path, dry: bool = False, only: list[str] | None = None, within: float = 60 * MINUTES) -> dict:
    """{"machine", "versions", "date", "dry", "parts": {name: part}}; also in `folder`/results.json, written again after
    every part. A part: {"about", "command", "limit", "rc", "seconds", "log", "results"}.

    only: names of parts. within: seconds for all of them; a part that would begin too late has rc None.
    """
    chosen = parts(dry)
    unknown = set(only or ()) - {part.name for part in chosen}
    if unknown:
        raise ValueError(f"parts: got {', '.join(sorted(unknown))}, expected {', '.join(part.name for part in chosen)}")
    folder.mkdir(parents=True, exist_ok=True)
    found, began = {**_facts(dry), "dry": dry, "parts": {}}, time.monotonic()
    for part in chosen:
        if only and part.name not in only:
            continue
        left = within - (time.monotonic() - began)
        found["parts"][part.name] = _run_part(part, folder, left if dry else min(part.limit, left))
        _say(part, found["parts"][part.name], time.monotonic() - began)
        (folder / "results.json").write_text(json.dumps(found, indent=1))
    return found


def _facts(dry: bool) -> dict:
    import torch

    from ..timing import machine_facts

    return machine_facts(torch.device("cuda" if torch.cuda.is_available() and not dry else "cpu"))


def _run_part(part: Part, folder: Path, limit: float) -> dict:
    command, results = part.command(folder), folder / f"{part.name}.json"
    results.unlink(missing_ok=True)
    found = {"about": part.about, "command": " ".join(["python", *command[1:]]), "limit": round(limit)}
    if limit < 5:
        return found | {"rc": None, "seconds": 0.0, "log": "no time was left", "results": None}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    began, log = time.monotonic(), folder / f"{part.name}.log"
    with log.open("w") as out:
        # a group of its own: what the part started ends with it
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "timeout"
    text = log.read_text(errors="replace")
    found |= {"rc": code, "seconds": round(time.monotonic() - began, 1), "log": text[-_TAIL:]}
    return found | {"results": json.loads(results.read_text()) if results.exists() else None}


def _say(part: Part, found: dict, at: float) -> None:
    print(f"== {part.name}: {part.about}. rc {found['rc']}, {found['seconds']:.0f} s (at {at:.0f} s)")
    for line in found["log"].splitlines()[-12:]:
        print("  ", line[:170])
    sys.stdout.flush()
