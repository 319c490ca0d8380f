"""Whether a checkpoint had all weights of its model: transformers fills in random ones for those that it lacks."""

from __future__ import annotations

from ..plans.layer_plan import brief
from .errors import CheckpointError


def check_loaded(name: str, loaded: dict) -> None:
    """Raise CheckpointError if weights were missing or of other shapes. loaded: what transformers' `from_pretrained`
    gives under `output_loading_info`."""
    missing = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if missing:
        raise CheckpointError(
            f"model: got {brief(name)} without {brief(missing[0])} and {len(missing) - 1} more of the model's weights, "
            "expected all of them"
        )
