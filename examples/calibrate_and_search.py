"""Calibrate a model on its own data, then search the plan for a quarter of the visual tokens' FLOPs.

    python examples/calibrate_and_search.py [FOLDER]

Works on training questions of a shipped model and scores on held-out ones. Writes calibration.safetensors and
plan.yaml to FOLDER (by default out/examples); `vis_sparse.patch(model, FOLDER / "plan.yaml")` takes the plan from
there. Prints how many heads matter in each layer, the FLOPs of the plan and the share of right answers, beside dense
and beside YOPO at the same budget. So few samples and so little time are for a try: take hundreds, and no time limit.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vis_sparse
from vis_sparse.calibration.samples import encode
from vis_sparse.eval.data import records
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.eval.tiny.data import KINDS, questions
from vis_sparse.eval.tiny.score import score

BUDGET = 0.25

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"))
folder = parser.parse_args().folder
folder.mkdir(parents=True, exist_ok=True)

model = AutoModelForImageTextToText.from_pretrained(checkpoint("llava"), dtype=torch.float32)
processor = AutoProcessor.from_pretrained(checkpoint("llava"))
# a record is an image, a question and perhaps an answer: for yours, `read_records("data.jsonl")` of calibration.records
samples = [encode(processor, record) for record in records("tiny-train", 32, prompt=None)]

calibration = vis_sparse.calibrate(model, samples, out=folder / "calibration.safetensors")
mattering = (calibration.heads > 0.02).sum(axis=1)
print("heads with an effect above 0.02, by layer:", *mattering)

searched = vis_sparse.search(model, samples[:8], budget=BUDGET, calibration=calibration, time_limit=5)
(folder / "plan.yaml").write_text(searched.to_yaml())
print("written:", folder / "calibration.safetensors", folder / "plan.yaml")

asked = [question for kind in KINDS for question in questions(kind, 12)]
prompt = {"text_tokens": 11, "text_before": 2}  # of these questions: what the search counted
dense = vis_sparse.flops(model, "dense", **prompt).prefill.lane("visual")
for plan in ("dense", searched, "yopo-25"):
    share = vis_sparse.flops(model, plan, **prompt).prefill.lane("visual") / dense
    with vis_sparse.patched(model, plan, calibration=calibration):
        right = score(model, processor, asked)
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in right.items())
    print(f"{getattr(plan, 'name', plan)}: visual FLOPs {share:.0%}; right: {shares}")
