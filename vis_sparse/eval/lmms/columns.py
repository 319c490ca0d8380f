"""What a sample cost, on its way from the model into lmms-eval's samples file, results file and table.

The samples file has it by lmms-eval's own means: a model may return token counts with an answer, and `SampleCost` is
such counts with more fields. Results are another matter: their metrics come from the task, which never sees the counts.
So `install` wraps the function of lmms-eval that scores one document, and adds the columns there; lmms-eval gathers,
averages and prints them like any metric.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import asdict, dataclass

from lmms_eval import evaluator
from lmms_eval.api.instance import TokenCounts
from lmms_eval.api.metrics import mean


@dataclass
class SampleCost(TokenCounts):
    """What one answer cost; None: not known.

    flops, flops_dense: of the decoder in prefill under the plan and under none, convention `executed`. kv_bytes,
    kv_bytes_dense: of the cache after prefill. visual_tokens, text_tokens: of the prompt. seconds: of its `generate`,
    divided by the samples of the batch. seconds_dense: of the unpatched model for the same input, timed right before or
    after. error: why there is no answer.
    """

    flops: int | None = None
    flops_dense: int | None = None
    kv_bytes: int | None = None
    kv_bytes_dense: int | None = None
    visual_tokens: int | None = None
    text_tokens: int | None = None
    seconds: float | None = None
    seconds_dense: float | None = None
    error: str | None = None

    def to_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


def median(values) -> float:
    """Of paired ratios, one a sample."""
    return statistics.median(values)


# column -> (its value for a sample, the field that must be known; over samples; is more better)
COLUMNS = {
    "gflops": (lambda cost: cost.flops / 1e9, "flops", mean, False),
    "gflops_dense": (lambda cost: cost.flops_dense / 1e9, "flops_dense", mean, False),
    "kv_mib": (lambda cost: cost.kv_bytes / 2**20, "kv_bytes", mean, False),
    "kv_mib_dense": (lambda cost: cost.kv_bytes_dense / 2**20, "kv_bytes_dense", mean, False),
    "latency_ms": (lambda cost: cost.seconds * 1e3, "seconds", mean, False),
    "speedup": (lambda cost: cost.seconds_dense / cost.seconds, "seconds_dense", median, True),
    "failed": (lambda cost: 1, "error", sum, False),
}


def install() -> None:
    """Let every task report `COLUMNS` for answers that come with a `SampleCost`."""
    plain = evaluator._process_document_results
    if getattr(plain, "reports_columns", False):
        return

    @functools.wraps(plain)
    def process(item, *, task, **options):
        processed = plain(item, task=task, **options)
        _, _, requests = item
        costs = [request.token_counts[0] for request in requests if request.token_counts]
        for cost in costs:
            if isinstance(cost, SampleCost):
                _add(cost, task, processed)
        return processed

    process.reports_columns = True
    evaluator._process_document_results = process


def _add(cost: SampleCost, task, processed) -> None:
    for name, (value, field, over_samples, more_is_better) in COLUMNS.items():
        if getattr(cost, field) is None:
            continue
        task.aggregation()[name] = over_samples
        task.higher_is_better()[name] = more_is_better
        processed.metrics[name] = value(cost)
        if processed.logged_sample is not None:
            processed.logged_sample[name] = processed.metrics[name]
