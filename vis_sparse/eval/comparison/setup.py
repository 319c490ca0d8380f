"""What a comparison is made with: a shipped model, training samples, and where its files go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...calibration.measure import calibrate
from ...calibration.samples import encode
from ...plans.scores import Calibration
from ..data import TINY, records
from ..tiny import checkpoint


@dataclass(frozen=True)
class Setup:
    """name: of the model. samples: training questions that calibration and searches see. asked: held-out questions of
    each kind. time_limit: of each search, seconds. out: a folder. on_step(done, total): told of progress."""

    name: str
    model: torch.nn.Module
    processor: object
    samples: list[dict]
    calibration: Calibration
    asked: int
    time_limit: float | None
    out: Path
    on_step: Callable[[int, int], None]

    @classmethod
    def of(cls, name: str, num_samples: int, with_tower: bool, **settings) -> Setup:
        """with_tower: calibrate the vision encoder too."""
        folder, data = checkpoint(name), next(data for data, of in TINY.items() if of == name)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(folder)
        samples = [encode(processor, record) for record in records(data, num_samples, None)]
        calibration = calibrate(model, samples, data=data, tower=with_tower)
        return cls(name, model, processor, samples, calibration, **settings)

    def file(self, ending: str) -> Path:
        """One of the files, which all begin with the model's name."""
        return self.out / f"{self.name}{ending}"
