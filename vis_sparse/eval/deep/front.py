"""Answers of plans on the deep model: `python -m torch.distributed.run --standalone --nproc-per-node 2 -m
vis_sparse.eval.deep.front --out FOLDER --plans dense,auto,vica --calibration FILE --batches 60 --json FILE`.

The held-out questions of `answers`, in bf16, the plan as `planned` computes it; `blind` is the plan under which no text
reads a visual token. FLOPs are those of the decoder's visual rows, by `flops`.
"""

import argparse
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

from vis_sparse import flops
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.cost.shapes import ModelShape
from vis_sparse.eval.deep import adapter_files
from vis_sparse.eval.deep.answers import Answers, answered
from vis_sparse.eval.deep.export import SHIPPED, weights_of
from vis_sparse.eval.deep.model import Model
from vis_sparse.eval.deep.planned import PlannedDecoder
from vis_sparse.eval.deep.run import gathered, join, rank, world
from vis_sparse.eval.tiny import checkpoint, model_smol, smollm2
from vis_sparse.eval.tiny.data import IMAGE_SIZE
from vis_sparse.eval.tiny.smol_files import adapter_difference, merged
from vis_sparse.plans.budgets import resolve_heads
from vis_sparse.plans.files import as_plan
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.schedule import LayerWork, schedule
from vis_sparse.plans.scores import Calibration

BLIND, DENSE = "blind", "dense"
SAVE_STEPS = 5
TEXT_BEFORE, TEXT = 24, 40  # tokens of a typical prompt


def resolved(name: str, calibration: Path | None) -> VisualPlan:
    """A plan by name or file, or `BLIND`, with its budgets turned into heads and neurons."""
    config = smollm2.config()
    layers = config.num_hidden_layers
    plan = VisualPlan.vtw(layers, 0).replace(name=BLIND) if name == BLIND else as_plan(name, layers)
    known = None if calibration is None else Calibration.load(calibration)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return resolve_heads(plan, heads, kv_heads, None if known else "first", calibration=known)


def work_of(plan: VisualPlan) -> tuple[LayerWork, ...]:
    config = smollm2.config()
    return schedule(plan, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)


def planned(
    state: dict[str, Tensor], work: tuple[LayerWork, ...], kind: type[PlannedDecoder] = PlannedDecoder, **options
) -> PlannedDecoder:
    """A decoder under a plan for sequences about images."""
    start = TEXT_BEFORE
    visual = slice(start, start + model_smol.VISUAL_TOKENS)
    return kind(work, visual, model_smol.GRID, smollm2.config(), state, **options)


def share_of_flops(plan: VisualPlan) -> float:
    """Of the dense plan's FLOPs for visual rows in a prefill."""
    return _spent(plan) / _whole()


def _spent(plan: VisualPlan) -> int:
    report = flops(_shape(), plan, image_size=(IMAGE_SIZE, IMAGE_SIZE), text_tokens=TEXT, text_before=TEXT_BEFORE)
    return report.prefill.lane("visual")


@cache
def _shape() -> ModelShape:
    return load_shape(checkpoint("smol"))


@cache
def _whole() -> int:
    return _spent(VisualPlan.dense(_shape().layers))


def front(
    weights: Mapping[str, Tensor], added: Mapping[str, Tensor], plans: dict[str, VisualPlan], batches: int, file: Path
) -> None:
    """Ask plans the first `batches` batches; answers of plans that `file` has stay, `plans` are asked anew.

    added: an adapter's difference, to the decoder and the projector of all of them.
    """
    known = Answers.load(file) if file.exists() else Answers("", {}, {})
    dense, names = work_of(resolved(DENSE, None)), list(plans)
    works = {name: work_of(plan) for name, plan in plans.items()}
    model = Model(lambda tensors: planned({key: merged(key, value, added) for key, value in tensors.items()}, dense))
    model.load(weights)
    if added:
        adapter_files.merge(model.projector, added)
    model.decoder.refresh()
    model.decoder.compile_pointwise()
    kinds, right = "", dict.fromkeys(names, "")
    # batches go to the processes in turn
    for step, (own_kinds, own_right) in enumerate(answered(model, dense, works, range(rank(), batches, world()))):
        for each_kinds, each_right in gathered((own_kinds, own_right)):
            kinds += each_kinds
            right = {name: right[name] + each_right[name] for name in names}
        if rank() == 0 and (step % SAVE_STEPS == SAVE_STEPS - 1 or (step + 1) * world() >= batches):
            longest = max(kinds, known.kinds, key=len)
            assert longest.startswith(min(kinds, known.kinds, key=len))
            shares = {name: round(share_of_flops(plan), 4) for name, plan in plans.items()}
            Answers(longest, known.right | right, known.visual_flops | shares).save(file)
            print(f"{(step + 1) * world()} of {batches} batches, {len(kinds):,} questions", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tiny/smol"), metavar="FOLDER", help="of the training")
    parser.add_argument("--stage", default=SHIPPED, help="whose weights are asked: shipped, whole, ...")
    parser.add_argument("--plans", required=True, metavar="A,B,...")
    parser.add_argument("--calibration", type=Path, metavar="FILE")
    parser.add_argument("--batches", type=int, default=180, help="of all processes; a multiple of their number")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="answers; other plans' stay")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="for all plans")
    parser.add_argument("--note", default="trained", help="behind the plans' names, where there is an adapter")
    given = parser.parse_args()
    join()
    added, ending = ({}, "") if given.adapter is None else (adapter_difference(given.adapter), f", {given.note}")
    plans = [resolved(name, given.calibration) for name in given.plans.split(",")]
    named = {f"{plan.name}{ending}": plan for plan in plans}
    front(weights_of(given.out, given.stage), added, named, given.batches, given.json)
