"""Ranges of layers, by index or by depth, as plan files write them."""

from __future__ import annotations

import math
import re

from .layer_plan import PlanError, brief


def layer_range(spec: str, num_layers: int) -> range:
    """The layers that `spec` names in a model of `num_layers` layers (see `PlanRecipe`).

    Indices must exist in the model; an open end stops at the last layer. Depth ranges are half open.
    """
    start_text, dash, end_text = spec.partition("-")
    try:
        if spec.startswith("<"):
            end = math.ceil(_depth(spec[1:], 0.0) * num_layers - 1e-6)
            if not 0 < end <= num_layers:
                raise ValueError
            return range(end - 1, end)
        if "%" in spec:
            start, end = _depth(start_text, 0.0), _depth(end_text, 1.0) if dash else None
            if end is None or not 0 <= start <= end <= 1:
                raise ValueError
            # l / L compared with a tolerance, so that 21.875 % of 32 is layer 7 whatever the division gives
            first, last = (math.ceil(bound * num_layers - 1e-6) for bound in (start, end))
            return range(first, last)
        start = _index(start_text) if start_text or not dash else 0
        end = start if not dash else (_index(end_text) if end_text else max(num_layers - 1, start))
        if not 0 <= start <= end:
            raise ValueError
    except ValueError:
        raise PlanError(
            f"layers: got range {brief(spec)}, expected like 4, 2-15, 2-, 50%-100%, 50%- or <50% in ascending order"
        ) from None
    if end >= num_layers:
        raise PlanError(f"layers: got range {brief(spec)}, expected layers 0 to {num_layers - 1}")
    return range(start, end + 1)


def _index(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError
    return int(text)


def _depth(text: str, default: float) -> float:
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?%", text):
        raise ValueError
    return float(text[:-1]) / 100
