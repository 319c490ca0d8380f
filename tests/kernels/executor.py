"""A patched model on a backend against the oracle: what the executor asks of a backend that its own tests don't."""

from __future__ import annotations

from dataclasses import replace

import torch

import vis_sparse

from .. import oracle
from ..executor.test_parity import SCENARIOS
from ..models import IMAGE, VOCAB, make_batch, make_model, random_plan, run, text_inputs


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


def largest_gradient_difference(backend: str, text: str, semantics: str, device: torch.device | str = "cpu") -> float:
    """Of the gradients of all parameters of an fp32 model, tower and projector included, to the float64 oracle's, in
    the norm, over that gradient's norm (or 1e-3 of the largest: little is left of smaller ones in fp32)."""
    reference, plan = make_model(text), random_plan(450 + len(text), semantics)
    batch = make_batch(reference, [(5, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (7,)])
    rows = batch.attention_mask.bool() & ~oracle.grid_of(batch.layout, batch.length).visual
    weights = torch.randn(int(rows.sum()), VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    embeds = text_inputs(reference, **batch.by_ids(), grad=True)
    (oracle.logits(reference, plan, batch.layout, embeds, batch.attention_mask)[rows] * weights).sum().backward()

    model = vis_sparse.patch(make_model(text, dtype=torch.float32).to(device), plan, backend=backend)
    call = {name: tensor.to(device) for name, tensor in batch.by_ids().items()}
    call["pixel_values"] = call["pixel_values"].float()
    (model(**call, use_cache=False).logits[rows.to(device)] * weights.float().to(device)).sum().backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found and set(found) <= set(wanted)
    least = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())

    def difference(name: str, gradient: torch.Tensor) -> float:
        own = found[name].cpu() if name in found else torch.zeros_like(gradient)
        return float((own - gradient).norm()) / max(float(gradient.norm()), least)

    return max(difference(name, gradient) for name, gradient in wanted.items())
