"""Layers of vision encoders under plans, timed: `python -m vis_sparse.eval.bench_tower`.

Real widths, random weights, fp32, the dense plan and the unpatched layers in turns with the others, process time.
Efficiency: how many times as fast as the dense plan, over how many times fewer FLOPs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig

from ..cost.shape_lookup import load_shape
from ..cost.tower import tower_layers
from ..executor.tower import TowerExecutor, TowerRun
from ..executor.tower_tables import TowerRows, TowerTables
from ..kernels import get_backend
from ..patches.tower import blocks_of, read_tower
from ..patches.tower_qwen import QWEN2_TOWER
from ..patches.tower_vit import CLIP
from ..plans.layer_plan import LayerPlan, Neighborhood
from ..plans.plan import VisualPlan
from .bench_model import fill_randomly
from .timing import in_turns, paired_ratio

PLANS = {
    "dense": LayerPlan(),
    "half the FFN": LayerPlan(ffn=0.5),
    "neighbours of radius 2": LayerPlan(attention=Neighborhood(2, "both")),
    "windows of 8 x 8": LayerPlan(attention=Neighborhood(0, "both", stride=8)),
    "windows, half the heads and FFN": LayerPlan(
        attention=Neighborhood(0, "both", stride=8), heads=(True,) * 8 + (False,) * 8, ffn=0.5
    ),
}


def _clip(depth: int):
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=depth, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    rows = CLIP.rows(CLIPVisionModel(config), {"pixel_values": np.empty((1, 3, 336, 336))})
    return CLIP, CLIPVisionModel(config), rows, "llava-1.5-7b", [(24, 24)]


def _qwen(depth: int):
    # 1920 x 1080 pixels, as the processor resizes them
    grid = load_shape("qwen2-vl-7b").image.encode(1080, 1920).sequences
    tower = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(depth=depth))
    rows = QWEN2_TOWER.rows(tower, {"grid_thw": np.array([[1, *grid[0]]])})
    return QWEN2_TOWER, tower, rows, "qwen2-vl-7b", list(grid)


TOWERS: dict[str, Callable] = {"clip-l-336": _clip, "qwen2-vl-1080p": _qwen}


def _calls(kind, tower, rows: TowerRows, depth: int, plans: Sequence[str]) -> dict[str, Callable[[], torch.Tensor]]:
    read, blocks = read_tower(kind, tower), blocks_of(kind, tower)
    width = read.num_heads * read.head_dim
    hidden = torch.randn(len(rows.y), width, generator=torch.Generator().manual_seed(0))
    turns = torch.rand(len(rows.y), read.head_dim // 2).repeat(1, 2)
    angles = turns.cos(), turns.sin()
    tables = TowerTables.of(rows, torch.device("cpu"))

    def unpatched():
        x = hidden[None] if kind.is_batched else hidden
        for block in blocks:
            x = block(x, **kind.block_arguments(rows, *angles))
        return x

    def under(executor: TowerExecutor):
        run, x = TowerRun(executor, tables, depth), hidden
        for index in range(depth):
            x = run.layer(index, x, None if kind.is_batched else angles)
        return x

    calls = {"unpatched": unpatched}
    for name in plans:
        layer = PLANS[name]
        executor = TowerExecutor(read, VisualPlan((layer,) * depth, "tower"), get_backend("torch"))
        executor.kept_cuts.refresh()
        calls[name] = lambda executor=executor: under(executor)
    return calls


@torch.no_grad()
def measure(
    name: str, depth: int, rounds: int, plans: Sequence[str] = tuple(PLANS)
) -> list[tuple[str, float, float, float]]:
    """(plan, seconds, median over rounds, times as fast as the dense plan, times fewer FLOPs) of the unpatched layers
    and of `plans`, the dense one among them."""
    kind, tower, rows, model, grids = TOWERS[name](depth)
    fill_randomly(tower.eval(), torch.Generator().manual_seed(0))
    calls = _calls(kind, tower, rows, depth, plans)
    for call in calls.values():  # tables and caches
        call()

    def seconds(variant: str) -> dict[str, float]:
        start = time.process_time()
        calls[variant]()
        return {"s": time.process_time() - start}

    found = in_turns(list(calls), seconds, rounds)
    shape = load_shape(model).vision
    work = {
        name: sum(cost.total for cost in tower_layers(shape, VisualPlan((layer,) * shape.layers), grids)[:depth])
        for name, layer in PLANS.items()
    }
    work["unpatched"] = work["dense"]
    dense = found["dense"]["s"]
    return [
        (variant, statistics.median(times["s"]), paired_ratio(dense, times["s"]), work["dense"] / work[variant])
        for variant, times in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", default=",".join(TOWERS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plans", default=";".join(PLANS), help="with ; between them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| tower | plan | s | faster | fewer FLOPs | efficiency |\n| --- | --- | --- | --- | --- | --- |")
    for name in given.towers.split(","):
        plans = dict.fromkeys(["dense", *given.plans.split(";")])
        for plan, seconds, faster, fewer in measure(name, given.layers, given.rounds, tuple(plans)):
            cells = f"{seconds:.3f}", f"{faster:.2f}x", f"{fewer:.2f}x", f"{faster / fewer:.2f}"
            print(f"| {name} | {plan} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
