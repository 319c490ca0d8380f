"""Tables of one call: whose rows they are, which slots they read, and what they leave alone."""

import numpy as np
import torch

import vis_sparse
from vis_sparse.executor.cache import Book
from vis_sparse.executor.call import Call
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.layout.packing import pack
from vis_sparse.patches import unpatched
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood
from vis_sparse.plans.plan import VisualPlan

from .. import oracle
from ..models import IMAGE, LAYERS, extended, make_batch, make_model, run

NEAR = Neighborhood(1, "both")


def check_oracle(text, plan, samples, cuts=(), steps: int = 0):
    reference = make_model(text)
    prompt = make_batch(reference, samples)
    batch = extended(reference, prompt, steps)
    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask)
    logits, _ = run(vis_sparse.patch(make_model(text), plan), batch, [*cuts, *range(prompt.length, batch.length)])
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    assert (logits - expected)[rows].abs().max() <= 1e-5 * expected[rows].abs().max()


@torch.no_grad()
def test_rows_of_the_caller_stay_as_they_were():
    model = vis_sparse.patch(make_model(), VisualPlan.dense(LAYERS))
    batch = make_batch(model, [(3, IMAGE, 4)])
    text_model, (_, cache) = model.model.language_model, run(model, batch)
    with vis_sparse.use_layout(model, batch.layout):
        for rows, past in ((batch.embeds[:, -1:], cache), (batch.embeds[:, -3:], cache), (batch.embeds, None)):
            given = rows.clone()
            text_model(inputs_embeds=given, past_key_values=past, use_cache=True)
            assert torch.equal(given, rows)


def test_slots_behind_the_ranking_row_are_not_read():
    packing, book = pack(VisualLayout.from_grids([[(2, (1, 1, 2))]]), 8), Book(1, VisualPlan.dense(1))
    book.append(packing.slots(), 8)
    device = torch.device("cpu")
    # slots: the visual columns 2 and 3, then text in columns 0, 1, 4, 5, 6, 7
    call = Call.over(packing, book, None, device, ranks=np.array([3]))
    assert call.unread_slots.tolist() == [[False] * 6 + [True] * 2]
    assert call.ranking_rows(torch.arange(6)[None]).tolist() == [3]
    last = Call.over(packing, book, None, device)
    assert last.unread_slots is None and last.ranking_rows(torch.arange(6)[None]).tolist() == [5]


@torch.no_grad()
def test_layers_that_store_visual_keys_and_layers_that_do_not():
    """The same window over other slots, in one call after another."""
    read, unread = LayerPlan(attention=NEAR), LayerPlan(text_reads=False, attention=NEAR)
    for layers in ((read, unread, read), (unread, read, unread), (unread, unread, read)):
        check_oracle("llama-gqa", VisualPlan(layers), [(3, IMAGE, 4, IMAGE, 2)], cuts=[3 + 16 + 1], steps=2)


@torch.no_grad()
def test_columns_of_padding_keep_their_values():
    model = vis_sparse.patch(make_model(), VisualPlan.dense(LAYERS))
    for padding in ("left", "right"):
        batch = make_batch(model, [(5, IMAGE, 4), (2, IMAGE, 3)], padding)
        states = model.model(**batch.by_ids(), output_hidden_states=True).hidden_states
        blank = ~batch.attention_mask.bool()
        assert blank.any() and len(states) == LAYERS + 1
        for state in states[:-1]:
            assert torch.equal(state[blank], batch.embeds[blank])


@torch.no_grad()
def test_columns_that_are_masked_later_are_read_no_longer():
    model = vis_sparse.patch(make_model("llama-gqa"), VisualPlan.dense(LAYERS))
    batch = make_batch(model, [(5, IMAGE, 4), (3, IMAGE, 6)])
    mask = torch.ones(2, batch.length + 1, dtype=torch.long)
    mask[0, 1] = mask[1, -3] = 0
    rest = dict(input_ids=torch.tensor([[7], [8]]), attention_mask=mask, position_ids=torch.full((2, 1), batch.length))

    def step() -> torch.Tensor:
        return model(**rest, past_key_values=run(model, batch)[1]).logits

    logits = step()
    with unpatched(model):
        torch.testing.assert_close(logits, step(), atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_an_ffn_without_neurons_adds_nothing():
    """Not even its bias."""
    check_oracle("llama-bias", VisualPlan((LayerPlan(ffn=0.0),) * LAYERS), [(3, IMAGE, 4)])
