"""Two processes train what one does: `accelerate launch`, DistributedDataParallel over gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vis_sparse

from .samples import row, write
from .test_finetune import losses

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
# plain SGD: Adam's first steps turn rounding into whole steps
SETTINGS = ("--plan", "yopo-12", "--steps", "2", "--rate", "0.05", "--log-every", "1", "--distill", "0.3",
            "--eval-every", "2", "--optimizer", "sgd")  # fmt: skip


def launched(folder: Path, out: str, count: int, batch: int, *more: str) -> Path:
    """A run of the command in `count` processes, a launcher's environment around each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]), WORLD_SIZE=str(count))
    arguments = ["--model", "tiny/llava", "--data", folder / "data.json", "--eval-data", folder / "held_out.json",
                 "--out", folder / out, "--batch", str(batch), *SETTINGS, *more]  # fmt: skip
    command = [sys.executable, "-m", "vis_sparse", "finetune", *map(str, arguments)]
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)] if count > 1 else [{}]
    base = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (place if count > 1 else {})
    pipe = dict(cwd=ROOT, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen(command, env=base | rank, **pipe) for rank in ranks]
    said = [process.communicate(timeout=1500)[1] for process in started]
    assert not any(process.returncode for process in started), said
    return folder / out


@pytest.mark.parametrize("more", [(), ("--lora", "4", "--checkpointing")], ids=["whole", "lora, checkpointing"])
def test_two_processes_train_what_one_does(tmp_path, more):
    """One process has text alone at times, and answers are of several lengths."""
    write(tmp_path, [row(1 + n % 3, (1, 0, 2)[n % 3], start=n) for n in range(4)])
    write(tmp_path, [row(start=n) for n in (1, 2, 3)], "held_out.json")
    one, two = launched(tmp_path, "one", 1, 2, *more), launched(tmp_path, "two", 2, 1, *more)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4) and len(losses(one)) == 2
    models = [vis_sparse.from_pretrained(out, dtype=torch.float32) for out in (one, two)]
    for (name, expected), (_, found) in zip(*(model.named_parameters() for model in models), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=name)
    evaluated = [[line["eval_answers_right"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
                  if "eval_loss" in line] for out in (one, two)]  # fmt: skip
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 2
