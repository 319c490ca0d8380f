"""vis_sparse: every visual token stays, the computation on them goes (arXiv 2410.06169)."""

from importlib import import_module

# name -> module that defines it; imported on first use, so that the command line starts without torch
_EXPORTS = {
    "VisualPlan": "plan",
    "LayerPlan": "plan",
    "Neighborhood": "plan",
    "PlanError": "plan",
    "HeadBudget": "plan",
    "TokenBudget": "plan",
    "PlanRecipe": "recipe",
    "load_plan": "plan_yaml",
    "plan_names": "plan_yaml",
    "VisualLayout": "layout",
    "LayoutError": "layout",
    "load_heads": "heads",
    "flops": "cost",
    "calibrate": "calibration",
    "search": "calibration.search",
    "search_front": "calibration.search",
    "Calibration": "calibration",
    "SampleError": "calibration.records",
    "patch": "patches",
    "patched": "patches",
    "unpatch": "patches",
    "inspect": "patches",
    "use_layout": "patches",
    "PatchError": "patches.errors",
    "load_internvl2": "internvl2",
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
