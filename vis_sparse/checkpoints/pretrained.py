"""A checkpoint with the plan that it carries: loaded as transformers does, an adapter merged, and patched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils.peft_utils import find_adapter_config_file

from ..patches import Plan, patch
from ..plans.carried import plans_of_folder
from ..plans.files import load_plan
from ..plans.layer_plan import brief
from .errors import CheckpointError


def from_pretrained(
    checkpoint: str | Path, plan: Plan | Mapping[str, Plan] | None = None, *, backend: str = "auto", **settings: Any
) -> nn.Module:
    """The model of a checkpoint, patched with the plan that it carries.

    checkpoint: a folder or a name of the Hub, or an adapter's that was trained under a plan (`vis-sparse finetune
    --lora` writes one): the model that it belongs to is loaded, and the adapter merged into its weights. plan: another
    one instead; None where the checkpoint carries none either: "auto". backend: as in `patch`. settings: of
    transformers' `from_pretrained` (dtype, device_map, ...).

    Raises PlanError for a plan that does not fit, CheckpointError for an adapter that does not name its model.
    """
    adapter = None if (Path(checkpoint) / "config.json").is_file() else find_adapter_config_file(str(checkpoint))
    if adapter is None:
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, **settings)
    else:
        model = _merged(checkpoint, Path(adapter), settings)
        if plan is None:
            plan = plans_of_folder(Path(checkpoint)) if Path(checkpoint).is_dir() else load_plan(checkpoint)
    return patch(model, plan, backend=backend)


def _merged(checkpoint: str | Path, adapter: Path, settings: dict) -> nn.Module:
    from peft import PeftModel

    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"adapter: got {brief(str(checkpoint))} whose adapter_config.json names no base_model_name_or_path, "
            "expected the model that the adapter belongs to"
        )
    model = AutoModelForImageTextToText.from_pretrained(base, **settings)
    return PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload()
