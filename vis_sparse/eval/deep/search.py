"""Searches a plan for the deep model: `python -m vis_sparse.eval.deep.search --budget 0.12 --out FILE`.

`vis_sparse.search` over whole layers, with the losses of `probe`. Stopped and started again, it goes on from FILE.log;
the front so far is in a folder beside FILE.
"""

import argparse
from pathlib import Path

import torch

from vis_sparse.eval.deep.export import SHIPPED, weights_of
from vis_sparse.eval.deep.front import DENSE, TEXT, planned, resolved, share_of_flops, work_of
from vis_sparse.eval.deep.model import Model
from vis_sparse.eval.deep.probe import PackedProbe
from vis_sparse.eval.tiny import checkpoint, model_smol, smollm2
from vis_sparse.plans.atomic_write import replaced
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.scores import Calibration
from vis_sparse.searching.changes import WholeLayers
from vis_sparse.searching.log import Log
from vis_sparse.searching.pareto import described, write_front
from vis_sparse.searching.plan_losses import PlanLosses
from vis_sparse.searching.search import best_within, points_to

HEADS = "heads.safetensors"  # of the checkpoint: scores of heads and neurons


def search(folder: Path, stage: str, budget: float, start: str, batches: int, minutes: float, file: Path) -> None:
    config = smollm2.config()
    dense = work_of(VisualPlan.dense(config.num_hidden_layers))
    model = Model(lambda tensors: planned(tensors, dense))
    model.load(weights_of(folder, stage))
    model.decoder.refresh()
    model.decoder.compile_pointwise()
    probe = PackedProbe(model, batches)
    log = Log(file.with_name(file.name + ".log"), {"stage": stage, "batches": str(batches)})
    calibration = Calibration.load(Path(checkpoint("smol")) / HEADS)
    meter = PlanLosses(probe, share_of_flops, log, probe.num_samples // batches)
    ladder = WholeLayers(calibration, config.num_key_value_heads)
    prompt = f"a prompt of {model_smol.VISUAL_TOKENS} visual and {TEXT} text tokens"
    found = []
    for point in points_to(budget, meter, ladder, prompt, time_limit=60 * minutes, start=resolved(start, None)):
        found.append(point)
        print(f"{point.cost:.2%}: KL {point.kl:.4f}, right {point.accuracy:.1%}", flush=True)
        write_front(file.with_suffix(""), found, "visual")
    best = described(best_within(found, budget), "visual").replace(name=file.stem)
    with replaced(file) as new:
        new.write_text(best.to_yaml())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/tiny/smol"), metavar="FOLDER", help="of the training")
    parser.add_argument("--stage", default=SHIPPED, help="whose weights are searched for")
    parser.add_argument("--budget", type=float, required=True, help="share of the dense plan's FLOPs of visual rows")
    parser.add_argument("--start", default=DENSE, metavar="PLAN", help="to go down from")
    parser.add_argument("--batches", type=int, default=6, help="of three images and some 40 questions")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which nothing better is looked for")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the plan's YAML file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    search(given.folder, given.stage, given.budget, given.start, given.batches, given.minutes, given.out)
