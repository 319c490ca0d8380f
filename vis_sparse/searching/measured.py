"""Plans from dense to bold with what they lose on a user's own samples, for `patch(model, "auto", calibration=...)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..calibration.records import SampleError
from ..calibration.samples import answered, on_device
from ..cost.shape_lookup import shape_of
from ..plans.measured import KEY, MeasuredPlan, to_text
from ..plans.scores import Calibration
from .pareto import pareto
from .search import meter_of, search_front

if TYPE_CHECKING:
    from torch import nn


def with_measured_plans(
    calibration: Calibration,
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    *,
    budget: float = 0.1,
    time_limit: float | None = 60.0,
    batch: int = 16,
) -> Calibration:
    """The calibration, with plans that were found on one half of the samples and measured on the other half.

    samples: as `calibrate` takes them; without labels the model's own answers count. budget, time_limit (seconds),
    batch: of the search (`search_front`). A plan that was chosen among many by the samples it is measured on looks
    better than it is, hence the halves. Raises SampleError for fewer than two samples, and what `search_front` raises.
    """
    samples = [answered(model, on_device(sample, model), 16) for sample in samples]
    if len(samples) < 2:
        raise SampleError(f"samples: got {len(samples)}, expected two at least (one half finds, the other measures)")
    found = search_front(
        model, samples[::2], budget=budget, calibration=calibration, time_limit=time_limit, batch=batch
    )
    meter, shape = meter_of(model, samples[1::2], batch=batch), shape_of(model)
    plans = {point.plan.layers: point.plan for point in pareto(found)} | {meter.dense.layers: meter.dense}
    points = [meter(plan) for plan in plans.values()]
    count = len(samples[1::2])
    measured = [MeasuredPlan(point.plan, point.cost, point.kl, point.accuracy, count) for point in points]
    text = to_text(measured, shape.heads, shape.ffn)
    return dataclasses.replace(calibration, metadata=calibration.metadata | {KEY: text})
