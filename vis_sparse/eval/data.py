"""Data of the commands `calibrate` and `search` by name: files, folders, and what is generated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..calibration.records import Record, SampleError, read_records

TINY = {
    "tiny-train": "llava",
    "tiny-train-qwen2_vl": "qwen2_vl",
    "tiny-train-internvl": "internvl",
    "tiny-train-smol": "smol",
}
