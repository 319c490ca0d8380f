"""A patched model on a backend against the oracle: what the executor asks of a backend that its own tests don't."""

from __future__ import annotations

from dataclasses import replace

import torch

import vis_sparse

from .. import oracle
from ..executor.test_parity import SCENARIOS
from ..models import make_model, random_plan, run


def largest_difference(
    backend: str, scenario: str, text: str, semantics: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> float:
    """Of the logits under a random plan, over their largest value; prefill, chunks and decode as the scenario says."""
    reference = make_model(text)
    batch, cuts = SCENARIOS[scenario].build(reference)
    plan = random_plan(len(scenario), semantics)
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask)
    tensors = {name: getattr(batch, name).to(device) for name in ("input_ids", "attention_mask")}
    moved = replace(batch, embeds=batch.embeds.to(device, dtype), **tensors)
    model = vis_sparse.patch(make_model(text, dtype=dtype).to(device), plan, backend=backend)
    logits = run(model, moved, cuts, "embeds")[0].cpu()
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    return float((logits - expected)[rows].abs().max() / expected[rows].abs().max())
