"""`generate` with a patched model: the oracle's tokens under any plan, the unpatched model's under the dense plan."""

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import vis_sparse
from vis_sparse.plans.plan import VisualPlan

from .. import oracle
from ..models import (
    HEADS,
    IMAGE,
    IMAGE_TOKEN,
    LAYERS,
    TEXT_MODELS,
    VOCAB,
    extended,
    make_batch,
    make_model,
    random_plan,
)

STEPS = 6
ONE, ADJACENT = (5, IMAGE, 4), (3, IMAGE, IMAGE, 4)
every_semantics = pytest.mark.parametrize("semantics", ["exclude", "zero"])
every_text = pytest.mark.parametrize("text", TEXT_MODELS)


def generate(model, batch, **settings):
    """The new tokens of every sample."""
    # an end token that never comes: before transformers 5.17, drafting could not do without one
    settings = dict(max_new_tokens=STEPS, do_sample=False, eos_token_id=IMAGE_TOKEN) | settings
    return model.generate(**batch.to_generate(), **settings)[:, batch.length :]


@every_semantics
@every_text
@torch.no_grad()
def test_greedy_is_the_oracles(text, semantics):
    reference, plan = make_model(text), random_plan(500 + TEXT_MODELS.index(text), semantics)
    batch = make_batch(reference, [ONE, ADJACENT, (7,)])
    expected = oracle.greedy(reference, plan, batch.layout, batch.embeds, batch.attention_mask, STEPS)
    model = vis_sparse.patch(make_model(text), plan)
    assert torch.equal(generate(model, batch), expected)
    drafted = make_batch(reference, [ONE])
    expected = oracle.greedy(reference, plan, drafted.layout, drafted.embeds, drafted.attention_mask, STEPS)
    assert torch.equal(generate(model, drafted, prompt_lookup_num_tokens=3), expected), "drafts that are cropped again"
    assert torch.equal(generate(model, drafted, use_cache=False), expected)


@every_semantics
@torch.no_grad()
def test_beams_score_as_the_oracle_says(semantics):
    """The sum of log-probabilities of each beam that comes out, so the cache followed every reorder."""
    reference, plan, beams = make_model("llama-gqa"), random_plan(520, semantics), 3
    batch = make_batch(reference, [ONE, (2, IMAGE, 3)])
    out = vis_sparse.patch(make_model("llama-gqa"), plan).generate(
        **batch.to_generate(),
        max_new_tokens=STEPS,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = out.sequences[:, batch.length :]
    embeds = torch.cat([batch.embeds.repeat_interleave(beams, 0), reference.get_input_embeddings()(tokens)], dim=1)
    mask = torch.cat([batch.attention_mask.repeat_interleave(beams, 0), torch.ones_like(tokens)], dim=1)
    logits = oracle.logits(reference, plan, batch.layout.expanded(2 * beams), embeds, mask)
    chosen = logits[:, batch.length - 1 : -1].log_softmax(-1).gather(-1, tokens[..., None])
    torch.testing.assert_close(out.sequences_scores.double(), chosen.sum((1, 2)), rtol=0, atol=1e-4)


MODES = {
    "greedy": dict(),
    "sampling": dict(do_sample=True, temperature=1.5, top_k=0),
    "beams": dict(num_beams=3),
    "several-answers": dict(do_sample=True, num_return_sequences=3),
    "beam-sampling": dict(do_sample=True, num_beams=2, num_return_sequences=2),
    "prompt-lookup": dict(prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("mode", MODES)
@every_text
@torch.no_grad()
def test_dense_plan_generates_as_unpatched(text, mode):
    reference, dense = make_model(text), VisualPlan.dense(LAYERS)
    # drafts are for single samples; pictures of one sample stay together only if it has one
    batch = make_batch(reference, [ONE] if mode == "prompt-lookup" else [ONE, (2, IMAGE, 3), (7,)])
    answers = []
    for model in (reference, vis_sparse.patch(make_model(text), dense)):
        torch.manual_seed(7)
        answers.append(generate(model, batch, **MODES[mode]))
    assert torch.equal(*answers)


@torch.no_grad()
def test_assistant_model():
    plan, reference = random_plan(530), make_model()
    settings = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    assistant = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, eos_token_id=None, **settings)).double().eval()
    batch = make_batch(reference, [ONE])
    try:
        generate(reference, batch, assistant_model=assistant)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__} cannot do it unpatched: {error}")
    expected = oracle.greedy(reference, plan, batch.layout, batch.embeds, batch.attention_mask, STEPS)
    model = vis_sparse.patch(make_model(), plan)
    assert torch.equal(generate(model, batch, assistant_model=assistant), expected)


@every_semantics
@pytest.mark.parametrize("second", [(3,), (2, IMAGE, 3)], ids=["text", "image"])
@pytest.mark.parametrize("first", [ONE, (6,)], ids=["image", "text"])
@torch.no_grad()
def test_two_turns_on_a_kept_cache(first, second, semantics):
    """Each turn passes the whole conversation's ids and only its own picture."""
    reference, plan = make_model("llama-gqa"), random_plan(540, semantics)
    model, cache = vis_sparse.patch(make_model("llama-gqa"), plan), DynamicCache(config=reference.config.text_config)
    opening = make_batch(reference, [first])
    answer = generate(model, opening, past_key_values=cache)
    assert cache.get_seq_length() == opening.length + STEPS - 1

    question = make_batch(reference, [second], seed=9)
    said = torch.cat([opening.input_ids, answer, question.input_ids], dim=1)
    embeds = torch.cat([opening.embeds, reference.get_input_embeddings()(answer), question.embeds], dim=1)
    moved = question.layout.shifted(opening.length + STEPS)
    layout = vis_sparse.VisualLayout(1, opening.layout.segments + moved.segments)
    mask = torch.ones_like(said)
    pixels = dict(pixel_values=question.pixel_values) if question.pixel_values is not None else {}
    replies = model.generate(
        input_ids=said, attention_mask=mask, past_key_values=cache, max_new_tokens=STEPS, do_sample=False, **pixels
    )
    expected = oracle.greedy(reference, plan, layout, embeds, mask, STEPS)
    assert torch.equal(replies[:, said.shape[1] :], expected)


@torch.no_grad()
def test_merged_inputs():
    """Prompt embeddings under `use_layout`; the layout stays in force while tokens come."""
    reference, plan = make_model(), random_plan(550)
    batch = make_batch(reference, [(4, (1, 3, 5), 3), (2, (2, 2, 2), 2)])
    expected = oracle.greedy(reference, plan, batch.layout, batch.embeds, batch.attention_mask, STEPS)
    model = vis_sparse.patch(make_model(), plan)
    with vis_sparse.use_layout(model, batch.layout):
        tokens = model.generate(
            inputs_embeds=batch.embeds, attention_mask=batch.attention_mask, max_new_tokens=STEPS, do_sample=False
        )
    assert torch.equal(tokens, expected)


@every_semantics
@torch.no_grad()
def test_a_generated_image_token_is_text(semantics):
    """Without pictures it is an embedding like any other, as in the unpatched model."""
    reference, plan = make_model(), random_plan(560, semantics)
    batch = make_batch(reference, [ONE])
    token = torch.tensor([[IMAGE_TOKEN]])
    embeds = torch.cat([batch.embeds, reference.get_input_embeddings()(token)], dim=1)
    expected = oracle.logits(reference, plan, batch.layout, embeds)[:, -1]
    model = vis_sparse.patch(make_model(), plan)
    cache = model(**batch.by_ids(), use_cache=True).past_key_values
    logits = model(input_ids=token, past_key_values=cache).logits[:, -1]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


class Counted(TorchDispatchMode):
    """The names of the operations dispatched, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_text_only_is_untouched(padding):
    """Bit for bit, and not an operation more, in prefill and in decode."""
    reference = make_model("qwen2-gqa")
    heads = [[True] * (HEADS // 2) + [False] * (HEADS // 2)] * LAYERS
    model = vis_sparse.patch(make_model("qwen2-gqa"), VisualPlan.yopo(LAYERS, 3, 2, heads, 2))
    batch = make_batch(reference, [(9,), (6,)], padding)
    longer = extended(reference, batch, 1)
    logits, names = [], []
    for each in (reference, model):
        with Counted() as counted:
            prefill = each(**batch.by_ids(), use_cache=True)
            step = each(
                input_ids=longer.input_ids[:, -1:],
                attention_mask=longer.attention_mask,
                past_key_values=prefill.past_key_values,
            )
        logits.append((prefill.logits, step.logits))
        names.append(counted.names)
    assert torch.equal(logits[0][0], logits[1][0]) and torch.equal(logits[0][1], logits[1][1])
    assert names[0] == names[1]
