"""Samples of tiny models, and runs of `tests.launched` as processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from vis_sparse.calibration.samples import with_answer

from ..models import IMAGE, make_batch


def make_sample(model, parts=(3, IMAGE, 4), answer=2, seed=1) -> dict:
    batch = make_batch(model, [parts], seed=seed)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pixel_values": batch.pixel_values}
    tokens = torch.randint(1, 90, (answer,), generator=torch.Generator().manual_seed(seed))
    return with_answer(inputs, tokens) if answer else inputs


def make_samples(model, number=4) -> list[dict]:
    parts = [(3, IMAGE, 4), (1, IMAGE, 2, IMAGE, 1), (IMAGE, 5), (2, IMAGE, 3)]
    return [make_sample(model, parts[i % 4], 1 + i % 3, seed=i) for i in range(number)]


def launch(*arguments, launcher=("-m",)):
    command = [sys.executable, *launcher, "tests.launched", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
