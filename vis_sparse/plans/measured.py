"""Plans that were measured on a user's own samples, kept with a calibration: what `auto` may choose from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .carried import read_block, to_block
from .layer_plan import PlanError, brief, is_number
from .plan import VisualPlan

KEY = "plans"  # in a calibration's metadata


@dataclass(frozen=True)
class MeasuredPlan:
    """cost: share of the dense model's visual FLOPs. kl: KL(dense || plan) of the answers' tokens, nats, mean over the
    samples. accuracy: share of the samples whose whole answer is the likeliest. samples: that it was measured on, which
    no choice was made by."""

    plan: VisualPlan
    cost: float
    kl: float
    accuracy: float
    samples: int


def to_text(measured: Sequence[MeasuredPlan], num_heads: int, num_neurons: int) -> str:
    """JSON text of plans with heads as masks and neurons as indices."""
    numbers = [[each.cost, each.kl, each.accuracy, each.samples] for each in measured]
    blocks = [to_block({"plan": each.plan}, num_heads, num_neurons) for each in measured]
    return json.dumps([[block, *row] for block, row in zip(blocks, numbers)])


def from_text(text: str) -> list[MeasuredPlan]:
    """What `to_text` wrote. Raises PlanError for anything else."""
    try:
        rows = json.loads(text)
        if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 5 for row in rows):
            raise ValueError(f"got {brief(rows)}")
        if not all(is_number(value) for row in rows for value in row[1:]):
            raise ValueError("got something else than numbers beside a plan")
        return [MeasuredPlan(read_block(block, "calibration: plans")["plan"], *numbers) for block, *numbers in rows]
    except (ValueError, KeyError, RecursionError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"calibration: plans: expected measured plans ({error})") from None


def boldest(measured: Sequence[MeasuredPlan], most_loss: float) -> MeasuredPlan:
    """The cheapest plan whose KL is at most `most_loss` nats and whose accuracy is at most `most_loss` below dense.

    measured: the dense plan among them, which always is one.
    """
    if not is_number(most_loss) or most_loss < 0:
        raise PlanError(f"most_loss: got {brief(most_loss)}, expected a number >= 0")
    dense = next((each for each in measured if each.plan.is_dense), None)
    if dense is None:
        raise PlanError("calibration: plans: got none that is dense, expected it to compare with")
    within = [each for each in measured if each.kl <= most_loss and each.accuracy >= dense.accuracy - most_loss]
    return min((dense, *within), key=lambda each: (each.cost, each.kl))
