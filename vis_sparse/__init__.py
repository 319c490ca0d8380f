"""vis_sparse: every visual token stays, the computation on them goes (arXiv 2410.06169)."""

from importlib import import_module

# name -> module that defines it; imported on first use, so that the command line starts without torch
_EXPORTS = {
    "VisualPlan": "plans.plan",
    "LayerPlan": "plans.layer_plan",
    "Neighborhood": "plans.layer_plan",
    "PlanError": "plans.layer_plan",
    "HeadBudget": "plans.layer_plan",
    "TokenBudget": "plans.layer_plan",
    "PlanRecipe": "plans.plan",
    "load_plan": "plans.files",
    "plan_names": "plans.files",
    "VisualLayout": "layout.layout",
    "LayoutError": "layout.layout",
    "load_heads": "plans.budgets",
    "flops": "cost.flops",
    "calibrate": "calibration.measure",
    "search": "searching.search",
    "search_front": "searching.search",
    "Calibration": "plans.scores",
    "SampleError": "calibration.records",
    "patch": "patches",
    "patched": "patches",
    "unpatch": "patches",
    "inspect": "patches",
    "use_layout": "patches",
    "PatchError": "patches.errors",
    "load_internvl2": "checkpoints.internvl2",
    "released_plan": "patches.original_llava",
}
__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
