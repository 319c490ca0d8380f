"""vis_sparse: every visual token stays, the computation on them goes (arXiv 2410.06169)."""

from importlib import import_module
from typing import TYPE_CHECKING

# name -> module that defines it; imported on first use, so that the command line starts without torch
_EXPORTS = {
    "VisualPlan": "plans.plan",
    "LayerPlan": "plans.layer_plan",
    "Neighborhood": "plans.layer_plan",
    "PlanError": "plans.layer_plan",
    "HeadBudget": "plans.layer_plan",
    "TokenBudget": "plans.layer_plan",
    "TokensBefore": "plans.before",
    "PlanRecipe": "plans.plan",
    "load_plan": "plans.files",
    "plan_names": "plans.files",
    "VisualLayout": "layout.layout",
    "LayoutError": "layout.layout",
    "load_heads": "plans.budgets",
    "flops": "cost.flops",
    "calibrate": "calibration.measure",
    "fit": "calibration.fit",
    "search": "searching.search",
    "search_front": "searching.search",
    "Calibration": "plans.scores",
    "SampleError": "calibration.records",
    "patch": "patches",
    "patched": "patches",
    "unpatch": "patches",
    "inspect": "patches",
    "use_layout": "patches",
    "use_plan": "patches",
    "use_prompt": "patches",
    "PatchError": "patches.errors",
    "save_plan": "patches",
    "from_pretrained": "checkpoints.pretrained",
    "finetune": "training.finetune",
    "load_internvl2": "checkpoints.internvl2",
    "released_plan": "patches.original_llava",
}
__version__ = "0.2.0.dev0"

if TYPE_CHECKING:  # what type checkers and editors see: the same names, with their signatures
    from .calibration.fit import fit as fit
    from .calibration.measure import calibrate as calibrate
    from .calibration.records import SampleError as SampleError
    from .checkpoints.internvl2 import load_internvl2 as load_internvl2
    from .checkpoints.pretrained import from_pretrained as from_pretrained
    from .cost.flops import flops as flops
    from .layout.layout import LayoutError as LayoutError
    from .layout.layout import VisualLayout as VisualLayout
    from .patches import inspect as inspect
    from .patches import patch as patch
    from .patches import patched as patched
    from .patches import save_plan as save_plan
    from .patches import unpatch as unpatch
    from .patches import use_layout as use_layout
    from .patches import use_plan as use_plan
    from .patches import use_prompt as use_prompt
    from .patches.errors import PatchError as PatchError
    from .patches.original_llava import released_plan as released_plan
    from .plans.before import TokensBefore as TokensBefore
    from .plans.budgets import load_heads as load_heads
    from .plans.files import load_plan as load_plan
    from .plans.files import plan_names as plan_names
    from .plans.layer_plan import HeadBudget as HeadBudget
    from .plans.layer_plan import LayerPlan as LayerPlan
    from .plans.layer_plan import Neighborhood as Neighborhood
    from .plans.layer_plan import PlanError as PlanError
    from .plans.layer_plan import TokenBudget as TokenBudget
    from .plans.plan import PlanRecipe as PlanRecipe
    from .plans.plan import VisualPlan as VisualPlan
    from .plans.scores import Calibration as Calibration
    from .searching.search import search as search
    from .searching.search import search_front as search_front
    from .training.finetune import finetune as finetune
else:
    __all__ = sorted(_EXPORTS)

    def __getattr__(name: str):
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)

    def __dir__():
        return sorted([*globals(), *__all__])
