"""One cell of the parity table: a family in a scenario, patched, against the unpatched model and the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

import vis_sparse
from vis_sparse.plans.plan import VisualPlan

from .. import oracle
from ..models import dropping, random_plan
from .cases import CASES, LAYERS, Case
from .scenarios import SCENARIOS, Request, Scenario, make_request

STEPS, BEAMS = 4, 3
_NEW_WORDS = 5


@dataclass(frozen=True)
class Output:
    """logits: rows that were computed, (batch, rows, vocab), or scores of the beams. tokens: generated ones."""

    logits: torch.Tensor
    tokens: torch.Tensor | None = None


@cache
def model_of(case: Case, dtype: torch.dtype, role: str):
    """One model a role, so that the patched and the unpatched model share no state."""
    return case.build(dtype)


def answer(model, scenario: Scenario, request: Request) -> Output:
    """What a user does in this scenario."""
    inputs = request.inputs
    if scenario.run == "prefill":
        return Output(model(**inputs).logits)
    settings = dict(max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    if scenario.run == "beams":
        out = model.generate(**inputs, **settings, num_beams=BEAMS, output_scores=True, length_penalty=0.0)
        return Output(out.sequences_scores[:, None, None], out.sequences[:, inputs["input_ids"].shape[1] :])
    out = model.generate(**inputs, **settings, output_logits=True)
    if scenario.run == "second turn":
        ids = torch.cat([out.sequences, question(inputs)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, inputs["input_ids"].shape[1] :])], dim=1)
        turn = dict(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
        out = model.generate(**turn, **settings, output_logits=True)
    return Output(torch.stack(out.logits, dim=1), out.sequences[:, inputs["input_ids"].shape[1] :])


def question(inputs: dict) -> torch.Tensor:
    """The words of the second turn."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(20, 60, (len(inputs["input_ids"]), _NEW_WORDS), generator=generator)


def dense_errors(case: Case, scenario: Scenario) -> tuple[float, bool]:
    """Patched under the dense plan against unpatched, float32: the largest difference, and whether tokens are equal."""
    request = make_request(case, scenario, torch.float32)
    expected = answer(model_of(case, torch.float32, "unpatched"), scenario, request)
    with vis_sparse.patched(model_of(case, torch.float32, "patched"), VisualPlan.dense(LAYERS)) as model:
        actual = answer(model, scenario, request)
        assert_ran_in_lanes(model, request)
    difference = (actual.logits - expected.logits).abs()
    if scenario.run == "prefill":
        difference = difference[request.inputs["attention_mask"].bool()]
    return float(difference.max()), expected.tokens is None or torch.equal(actual.tokens, expected.tokens)


def assert_ran_in_lanes(model, request: Request) -> None:
    last = vis_sparse.inspect(model)["last_call"]
    assert (last is not None) == bool(request.layout.segments)


def oracle_error(case: Case, scenario: Scenario, semantics: str = "exclude", drops: bool = False) -> float:
    """Patched under a random plan against the oracle, float64: largest difference over the largest value.

    drops: a plan under which tokens leave.
    """
    request = make_request(case, scenario, torch.float64)
    number = CASES.index(case) * len(SCENARIOS) + list(SCENARIOS.values()).index(scenario)
    plan = dropping(1000 + number) if drops else random_plan(1000 + number, semantics)
    with vis_sparse.patched(model_of(case, torch.float64, "patched"), plan) as model:
        actual = answer(model, scenario, request)
        assert_ran_in_lanes(model, request)
    expected = _by_oracle(case, scenario, request, plan, actual.tokens)
    actual = actual.logits
    if scenario.run == "prefill":
        rows = oracle.compared_rows(plan, request.layout, request.inputs["attention_mask"])
        actual, expected = actual[rows], expected[rows]
    return float((actual - expected).abs().max() / expected.abs().max())


def _by_oracle(case, scenario, request, plan, tokens):
    """What the oracle computes of prompt and given tokens in one pass."""
    reference = model_of(case, torch.float64, "unpatched")
    call = text_call(reference, request.inputs, generates=scenario.run != "prefill")
    cuts = [call.embeds.shape[1]]
    if tokens is not None:
        call = call.followed_by(reference, tokens)
    given = (call.embeds, call.mask, call.positions, call.added, cuts)
    logits = oracle.logits(reference, plan, request.layout, *given)
    if tokens is None:
        return logits
    logits = logits[:, -1 - tokens.shape[1] : -1]
    if scenario.run == "beams":
        return logits.log_softmax(-1).gather(2, tokens[..., None]).sum(1, keepdim=True)
    return logits[:, -STEPS:]


@dataclass(frozen=True)
class TextCall:
    """How the unpatched outer model calls its text model. added: what DeepStack adds to visual rows, by layer."""

    embeds: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    added: tuple[torch.Tensor, ...] = ()

    def followed_by(self, model, tokens: torch.Tensor) -> TextCall:
        """The call with text tokens after it, in one piece."""
        steps = torch.arange(1, tokens.shape[1] + 1)
        return replace(
            self,
            embeds=torch.cat([self.embeds, model.get_input_embeddings()(tokens)], dim=1),
            mask=torch.cat([self.mask, torch.ones_like(tokens)], dim=1),
            positions=torch.cat([self.positions, self.positions[..., -1:] + steps], dim=-1),
        )


def text_call(model, inputs: dict, generates: bool) -> TextCall:
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    hook = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        if generates:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        else:
            model(**inputs)
    finally:
        hook.remove()
    embeds, mask = seen["inputs_embeds"], inputs["attention_mask"]
    positions = seen.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    positions = positions[-3:] if positions.dim() == 3 else positions.expand(len(embeds), -1)
    return TextCall(embeds, mask, positions, tuple(seen.get("deepstack_visual_embeds") or ()))
