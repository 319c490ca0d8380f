"""Trains an adapter of the deep model under a plan: `python -m torch.distributed.run --standalone --nproc-per-node 2 -m
vis_sparse.eval.deep.adapt --out FOLDER --plan vica --minutes 15`.

The tower stays, the decoder with its own difference (and what `vis-sparse fit` adds) and the projector are the frozen
base, and one more low-rank difference of both is trained on the dialogs of the base's training, with visual rows
computed as the plan says.
FOLDER/adapt-PLAN gets the log, the state, and the adapter in peft's format, with the plan in it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from vis_sparse.eval.deep import adapter_files, texts
from vis_sparse.eval.deep.decoder import Decoder
from vis_sparse.eval.deep.export import SHIPPED, difference, weights_of
from vis_sparse.eval.deep.front import planned, resolved, work_of
from vis_sparse.eval.deep.model import Model, answer_loss
from vis_sparse.eval.deep.projector import projected
from vis_sparse.eval.deep.run import Run, Schedule, join, rank, rounded
from vis_sparse.eval.deep.scoring import counted, shares
from vis_sparse.eval.deep.sequences import sequences
from vis_sparse.eval.deep.vision import features, seen
from vis_sparse.eval.tiny.smol_files import adapter_difference, merged

SEED = 3
RANK = 3
RATE = 1e-3
# Images of a process's sequences, pages above all, since reading comes last; chats come alone, as visual rows have a
# place of their own.
MIXES = (
    ("page", "page", "grid"), ("page", "shape", "page"), ("page", "grid", "page"), ("grid", "page", "page"),
    ("page", "page", "page"), ("chat",),
)  # fmt: skip
LOG_STEPS, HELD_OUT_STEPS = 5, 40


def train(folder: Path, base: str, name: str, calibration: Path | None, fit: Path | None, minutes: float) -> None:
    weights, chats = weights_of(folder, base), texts.answered(folder / "texts.json")
    added = difference(weights)
    fitted = {} if fit is None else adapter_difference(fit)
    plan = resolved(name, calibration)
    work = work_of(plan)

    def on_the_base(tensors):
        tensors = {key: merged(key, value, added) for key, value in tensors.items()}
        tensors = {key: merged(key, value, fitted) for key, value in tensors.items()}
        return planned(tensors, work, rank=RANK, seed=SEED)

    model = Model(on_the_base)
    model.load(weights, ("projector", "tower"))
    out = folder / f"adapt-{Path(name).stem}"
    projector = adapter_files.with_difference(model.projector)
    parameters = {f"lora.{key}": parameter for key, parameter in model.decoder.lora.items()}
    parameters |= {f"projector.{key}": parameter for key, parameter in projector.items()}
    run = Run(out, Schedule(minutes, warmup=0.03, decay=0.6), [(RATE, parameters)])
    model.decoder.refresh()
    if run.step == 0:
        run.log(plan=plan.name, held_out=shares(counted(model, 3)))
    model.decoder.compile_pointwise()

    def loss():
        rng = np.random.default_rng([SEED, run.step, rank()])
        # the same kind in every process: a chat gives the projector no gradient
        mix = MIXES[run.step % len(MIXES)]
        data = sequences(model.tokenizer, rng, mix, chats)
        if mix == ("chat",):
            # a patched model computes a chat without an image as ever
            return {"answers": answer_loss(model, data, None, Decoder.forward)}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = features(model.tower, seen(data.images).pixels)[0]
        with torch.autocast("cpu", torch.bfloat16):
            visual = projected(model.projector, found)
        return {"answers": answer_loss(model, data, visual)}

    while not run.done:
        values = run.advance(loss)
        model.decoder.refresh()
        if run.step % LOG_STEPS == 0:
            run.log(plan=plan.name, loss=rounded(values))
        if run.step % HELD_OUT_STEPS == 0:
            run.log(plan=plan.name, held_out=shares(counted(model, 3)))
    run.save()
    run.log(plan=plan.name, held_out=shares(counted(model, 12)))
    if rank() == 0:
        adapter_files.write(out / "adapter", model.decoder, projector, plan, fitted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tiny/smol"), metavar="FOLDER", help="of the training")
    parser.add_argument("--stage", default=SHIPPED, help="whose weights are the base")
    parser.add_argument("--plan", required=True, metavar="NAME")
    parser.add_argument("--calibration", type=Path, metavar="FILE")
    parser.add_argument("--fitted", type=Path, metavar="FOLDER", help="of `vis-sparse fit`: what to begin with")
    parser.add_argument("--minutes", type=float, required=True)
    given = parser.parse_args()
    join()
    train(given.out, given.stage, given.plan, given.calibration, given.fitted, given.minutes)
