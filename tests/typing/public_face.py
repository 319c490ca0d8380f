# pyright: basic, reportUnknownMemberType=error, reportUnknownVariableType=error, reportUnknownArgumentType=error
# pyright: reportUnnecessaryTypeIgnoreComment=error
"""The public face as a user writes it. Nothing here runs: `make types` reads it as that user's editor would, and a test
sees to it that no public name is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import assert_type

import vis_sparse
from vis_sparse.calibration.fit import Fitted
from vis_sparse.cost.report import CostReport
from vis_sparse.searching.pareto import Point


def patching(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    assert_type(vis_sparse.patch(model), nn.Module)
    vis_sparse.patch(model, "yopo-25", heads="heads.safetensors", backend="torch")
    vis_sparse.patch(model, Path("mine.yaml"), calibration=Path("calibration.safetensors"))
    vis_sparse.patch(model, vis_sparse.load_plan("yopo-12"), heads=np.ones((32, 32), dtype=bool))
    vis_sparse.patch(model, "yopo-12", heads=torch.ones(32, 32, dtype=torch.bool))
    with vis_sparse.patched(model, "vtw") as patched:
        assert_type(patched, nn.Module)
    layout = vis_sparse.VisualLayout.from_grids([[(35, (1, 24, 24))]])
    assert_type(layout.num_visual, int)
    with vis_sparse.use_layout(model, layout):
        model(**inputs)
    vis_sparse.patch(model, {"fast": "yopo-12", "exact": vis_sparse.VisualPlan.dense(32)}, verify=False)
    with vis_sparse.use_plan(model, "exact"), vis_sparse.use_prompt(model, [40, 42]):
        model(**inputs)
    assert_type(vis_sparse.inspect(model), dict[str, Any] | None)
    assert_type(vis_sparse.unpatch(model), nn.Module)
    vis_sparse.patch("llava")  # pyright: ignore[reportArgumentType]
    vis_sparse.patch(model, plans="yopo-25")  # pyright: ignore[reportCallIssue]
    vis_sparse.pach(model)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def plans(model: nn.Module) -> None:
    assert_type(vis_sparse.plan_names(), list[str])
    recipe = vis_sparse.load_plan("yopo-12")
    assert_type(recipe, vis_sparse.PlanRecipe)
    assert_type(recipe.resolve(32), vis_sparse.VisualPlan)
    near = vis_sparse.Neighborhood(radius=2, direction="both")
    layer = vis_sparse.LayerPlan(attention=near, heads=vis_sparse.HeadBudget(0.25), ffn=0.5)
    fewer = vis_sparse.LayerPlan(tokens=vis_sparse.TokenBudget(0.5, by="norm"))
    plan = vis_sparse.VisualPlan((layer, fewer, vis_sparse.LayerPlan.off()), name="mine")
    assert_type(plan.replace(about="an example"), vis_sparse.VisualPlan)
    plan.replace(before=vis_sparse.TokensBefore("received", 0.5))
    assert_type(plan.to_yaml(), str)
    assert_type(vis_sparse.VisualPlan.from_yaml("mine.yaml", num_layers=32), vis_sparse.VisualPlan)
    for named in (vis_sparse.VisualPlan.dense(32), vis_sparse.VisualPlan.vtw(32, 16)):
        assert_type(named.num_layers, int)
    masks = vis_sparse.load_heads("heads.npy")
    vis_sparse.VisualPlan.yopo(32, head_mask=masks.tolist())
    assert_type(vis_sparse.released_plan(model, masks), vis_sparse.VisualPlan)


def costs(model: nn.Module, plan: vis_sparse.VisualPlan) -> None:
    assert_type(vis_sparse.flops("llava-1.5-7b", "yopo-12", image_size=(336, 336)), CostReport)
    report = vis_sparse.flops(model, plan, convention="paper")
    assert_type(report.total, int)
    assert_type(report.prefill.lane("visual"), int)


def measuring(model: nn.Module, samples: list[dict[str, Any]]) -> None:
    calibration = vis_sparse.calibrate(model, samples, sensitivity=True, out="calibration.safetensors")
    assert_type(calibration, vis_sparse.Calibration)
    assert_type(calibration.num_samples, int)
    calibration.save("calibration.safetensors")
    assert_type(vis_sparse.Calibration.load("calibration.safetensors"), vis_sparse.Calibration)
    fitted = vis_sparse.fit(model, samples, "still", rank=24, calibration=calibration)
    assert_type(fitted, Fitted)
    fitted.save("fitted", model)
    assert_type(vis_sparse.search(model, samples, budget=0.25, calibration=calibration), vis_sparse.VisualPlan)
    assert_type(vis_sparse.search_front(model, samples, cost="kv", time_limit=60), Iterator[Point])


def training(model: nn.Module, processor: Any) -> None:
    done = vis_sparse.finetune(model, processor, "data.json", "yopo-12", out="tuned", settings={"lora": 64, "steps": 9})
    assert_type(done, dict[str, Any])
    assert_type(vis_sparse.load_plan("yopo-12+2").whole_first(2), vis_sparse.PlanRecipe)


def loading(folder: Path) -> nn.Module:
    vis_sparse.patch(vis_sparse.from_pretrained(folder, dtype=torch.bfloat16), "org/plans", calibration="org/plans")
    vis_sparse.save_plan(vis_sparse.from_pretrained("org/model", "yopo-25", backend="torch"), folder)
    try:
        return vis_sparse.patch(vis_sparse.load_internvl2(folder, dtype=torch.bfloat16, device_map={"": "cuda:0"}))
    except (vis_sparse.PlanError, vis_sparse.LayoutError, vis_sparse.PatchError, vis_sparse.SampleError) as error:
        assert_type(error.args, tuple[Any, ...])
        raise
