"""Small conversations about random pictures, in the words of the small models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vis_sparse.eval.tiny import checkpoint
from vis_sparse.training.conversations import read_conversations

FAMILIES = ("llava", "qwen2_vl", "internvl")
TURNS = (("is there a seven?", "yes"), ("how often does the digit three appear?", "two"), ("is it not red?", "no no"))


def loaded(family: str = "llava"):
    """(model in fp32, processor) of a shipped model."""
    folder = checkpoint(family)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


def row(turns: int = 1, images: int = 1, start: int = 0) -> dict:
    """A row of LLaVA's JSON; its images stand in its first turns."""
    said = []
    for number in range(turns):
        question, answer = TURNS[(start + number) % len(TURNS)]
        shown = "<image>\n" * (images - number if number == turns - 1 else 1) if number < images else ""
        said += [{"from": "human", "value": shown + question}, {"from": "gpt", "value": answer}]
    names = [f"{start + number}.png" for number in range(images)]
    image = {} if not names else {"image": names[0] if images == 1 else names}
    return {"id": start, **image, "conversations": said}


def write(folder: Path, rows: list[dict], name: str = "data.json") -> Path:
    """The rows' file and the pictures that they name, of several sizes."""
    for each in rows:
        names = each.get("image", [])
        for name_ in [names] if isinstance(names, str) else names:
            number = int(name_.split(".")[0])
            size = (96 + 32 * (number % 3), 128 - 32 * (number % 2), 3)
            pixels = np.random.default_rng(number).integers(0, 256, size, np.uint8)
            Image.fromarray(pixels).save(folder / name_)
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def conversations(folder: Path, *rows: dict):
    return read_conversations(write(folder, list(rows)))
