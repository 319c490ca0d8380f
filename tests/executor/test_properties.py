"""Any plan on any layout in any sequence of calls is the oracle."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vis_sparse

from .. import oracle
from ..models import batches, cuts_for, extended, make_batch, make_model, plans, run

TEXTS = st.sampled_from(["llama", "qwen2-gqa"])
REFERENCES = {text: make_model(text) for text in ("llama", "qwen2-gqa")}


@settings(max_examples=60)
@given(
    text=TEXTS,
    plan=plans,
    samples=batches,
    padding=st.sampled_from(["left", "right"]),
    decode=st.integers(0, 2),
    data=st.data(),
)
@torch.no_grad()
def test_any_plan_layout_and_calls(text, plan, samples, padding, decode, data):
    reference = REFERENCES[text]
    prompt = make_batch(reference, samples, padding)
    batch = extended(reference, prompt, decode)
    cuts = data.draw(st.lists(st.sampled_from(cuts_for(plan, prompt)), max_size=3, unique=True), "cuts")
    backend = data.draw(st.sampled_from(["reference", "torch"]), "backend")
    cuts = sorted({*cuts, *range(prompt.length, batch.length)})

    expected = oracle.logits(reference, plan, batch.layout, batch.embeds, batch.attention_mask, cuts=cuts)
    with vis_sparse.patched(make_model(text), plan, backend=backend) as model:
        logits, cache = run(model, batch, cuts, by="embeds")
    rows = oracle.compared_rows(plan, batch.layout, batch.attention_mask)
    assert (logits - expected)[rows].abs().max() <= 1e-5 * expected[rows].abs().max()
    assert cache.get_seq_length() == batch.length


@settings(max_examples=40)
@given(plan=plans, samples=batches, data=st.data())
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(plan, samples, data):
    """Each sample of a padded batch as it is alone."""
    reference = REFERENCES["llama"]
    batch = make_batch(reference, samples, data.draw(st.sampled_from(["left", "right"]), "padding"))
    with vis_sparse.patched(make_model(), plan) as model:
        together, _ = run(model, batch, by="embeds")
        for row in range(len(samples)):
            real = batch.attention_mask[row].bool()
            start = int(real.int().argmax())
            alone = vis_sparse.VisualLayout.from_grids(
                [[(s.start - start, (s.frames, s.height, s.width)) for s in batch.layout.segments if s.sample == row]]
            )
            with vis_sparse.use_layout(model, alone):
                logits = model(inputs_embeds=batch.embeds[row : row + 1, real]).logits[0]
            rows = oracle.compared_rows(plan, alone, torch.ones(1, len(logits)))[0]
            difference = (logits - together[row, real])[rows].abs().max()
            assert difference <= 1e-5 * logits[rows].abs().max()
