"""Runs that tests start as processes: `python -m tests.launched calibrate|search FILE [N]`; with N they kill themselves
at their Nth step. Under a launcher, calibration shares the samples out."""

import os
import signal
import sys
from pathlib import Path

import torch

from vis_sparse.calibration import sums
from vis_sparse.calibration.measure import calibrate
from vis_sparse.searching.search import search_front

from .calibration.samples import make_samples
from .models import make_model


def run_calibrate(file, step):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo")
    model = make_model()
    calibrate(model, make_samples(model, 5), out=file, on_sample=step)


def run_search(file, step):
    model = make_model("llama-gqa")
    points = []
    for point in search_front(model, make_samples(model, 3), budget=0.3, log=file.with_suffix(".log")):
        points.append(f"{point.cost!r} {point.kl!r} {point.accuracy!r} {point.plan.layers!r}\n")
        step(len(points))
    file.write_text("".join(points))


def main(kind, file, kill_at="0"):
    def step(done):
        if done == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    sums._SAVE_SECONDS = 0
    {"calibrate": run_calibrate, "search": run_search}[kind](Path(file), step)


if __name__ == "__main__":
    main(*sys.argv[1:])
