"""Which tokens stay depends on the prompt alone, whatever else a call holds: answers, drafts, the tokens so far."""

import inspect

import pytest
import torch

import vis_sparse
from vis_sparse.plans.layer_plan import TokenBudget
from vis_sparse.plans.plan import VisualPlan

from ..models import IMAGE, LAYERS, _readable, extended, make_batch, make_model, random_plan, run

EXACT = dict(atol=1e-10, rtol=1e-10)
FASTV = VisualPlan.fastv(LAYERS, 1, 0.3)


def two_cuts(seed: int) -> VisualPlan:
    """Tokens leave by attention after two layers of a plan that is random elsewhere."""
    layers = [_readable(layer) for layer in random_plan(seed).layers]
    layers[0], layers[1] = (
        type(layer)(layer.text_reads, layer.attention, layer.heads, layer.ffn, TokenBudget(keep))
        for layer, keep in zip(layers, (0.6, 0.5))
    )
    return VisualPlan(tuple(layers))


PLANS = {"fastv": FASTV, **{f"random-{seed}": two_cuts(seed) for seed in range(2)}}


@pytest.fixture(params=PLANS)
def model(request):
    return vis_sparse.patch(make_model("llama-gqa"), PLANS[request.param])


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_an_answer_changes_nothing_before_it(model, padding):
    """With labels, prompts of two lengths: the logits before the last answer token do not depend on it."""
    prompt = make_batch(model, [(3, IMAGE, 4), (2, IMAGE, 3, IMAGE, 6)], padding)
    whole = extended(model, prompt, 5)
    call = {name: value for name, value in whole.by_ids().items() if name != "position_ids"}
    labels = torch.where(torch.arange(whole.length) >= prompt.length, whole.input_ids, -100)
    if padding == "right":  # the shorter sample's answer follows its padding; it is asked for there all the same
        call["attention_mask"][:, prompt.length :] = 1
    logits = model(**call, labels=labels).logits
    other = dict(call, input_ids=call["input_ids"].clone())
    other["input_ids"][:, -1] = 7
    changed = model(**other, labels=labels).logits
    torch.testing.assert_close(changed[:, :-1], logits[:, :-1], **EXACT)
    with vis_sparse.use_prompt(model, prompt.length):
        torch.testing.assert_close(model(**call).logits, logits, **EXACT)
    assert not torch.allclose(model(**other).logits[:, -3:-1], model(**call).logits[:, -3:-1]), "plans that show it"


@torch.no_grad()
def test_labels_by_their_place(model):
    """A call may name none of its arguments."""
    batch = make_batch(model, [(3, IMAGE, 8)])
    labels = torch.where(torch.arange(batch.length) >= 3 + 16 + 4, batch.input_ids, -100)
    call = {name: value for name, value in batch.by_ids().items() if name != "position_ids"} | dict(labels=labels)
    names = list(inspect.signature(type(model).forward).parameters)
    by_place = [call.get(name) for name in names[1 : names.index("labels") + 1]]
    expected = model(**call).logits
    torch.testing.assert_close(model(*by_place).logits, expected, **EXACT)
    assert not torch.allclose(model(*by_place[:-1]).logits, expected), "plans that show it"


@torch.no_grad()
def test_teacher_forcing_gives_the_logits_of_decoding(model):
    """The answer's logits in one call with labels are those of a prefill and decode steps."""
    prompt = make_batch(model, [(3, IMAGE, 4), (2, IMAGE, 7)])
    whole = extended(model, prompt, 5)
    stepwise, _ = run(model, whole, cuts=range(prompt.length, whole.length))
    labels = torch.where(torch.arange(whole.length) >= prompt.length, whole.input_ids, -100)
    logits = model(**whole.by_ids(), labels=labels).logits
    real = whole.attention_mask.bool()
    torch.testing.assert_close(logits[real], stepwise[real], **EXACT)


@torch.no_grad()
def test_prompts_of_several_lengths(model):
    """A length for each sample gives what each sample gives alone; one length for all is repeated."""
    batch = make_batch(model, [(3, IMAGE, 9), (5, IMAGE, 7)])
    ends = (3 + 16 + 4, 5 + 16 + 2)
    with vis_sparse.use_prompt(model, ends):
        logits = model(**batch.by_ids()).logits
    for row, end in enumerate(ends):
        one = {name: value[row : row + 1] for name, value in batch.by_ids().items()}
        with vis_sparse.use_prompt(model, end):
            torch.testing.assert_close(model(**one).logits[0], logits[row], **EXACT)
    with vis_sparse.use_prompt(model, (5, 6, 7)), pytest.raises(vis_sparse.PatchError, match="got 3 lengths"):
        model(**batch.by_ids())


@torch.no_grad()
def test_generation_without_a_cache(model):
    batch = make_batch(model, [(3, IMAGE, 4), (2, IMAGE, 7)])
    tokens = model.generate(**batch.to_generate(), do_sample=False, max_new_tokens=8)
    again = model.generate(**batch.to_generate(), do_sample=False, max_new_tokens=8, use_cache=False)
    assert torch.equal(again, tokens)


@torch.no_grad()
def test_assisted_decoding_is_greedy_decoding(model):
    """The first verification holds the prompt and drafts; what drafts say must not choose."""
    for seed in range(12):
        batch = make_batch(model, [(2 + seed % 3, IMAGE, 3 + seed % 5)], seed=seed)
        assistant = make_model(seed=seed + 1)
        call = dict(batch.to_generate(), do_sample=False, max_new_tokens=12)
        assert torch.equal(model.generate(**call, assistant_model=assistant), model.generate(**call)), seed


@torch.no_grad()
def test_an_image_behind_the_prompt_is_refused(model):
    batch = make_batch(model, [(3, IMAGE, 4)])
    refused = pytest.raises(vis_sparse.LayoutError, match="expected text of the prompt after")
    with vis_sparse.use_prompt(model, 3), refused:
        model(**batch.by_ids())
