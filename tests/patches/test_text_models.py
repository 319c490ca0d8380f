"""Every text model type of transformers inside a LLaVA: refused by name, or right."""

import numpy as np
import pytest
import torch

import vis_sparse
from vis_sparse import PatchError
from vis_sparse.patches import unpatched

from ..marks import slow_but
from .text_models import IMAGE_TOKEN, TYPES, VOCAB, NotBuilt, NoTextModel, llava, odd_settings, text_config
from .wrap_kinds import buffers_only, lora, torchao_activations

# Their modules have Llama's names, and compute something else.
DISGUISED = ("diffllama", "ernie4_5", "glm", "helium", "smollm3")
# At least these are right.
RIGHT = ("gemma", "granite", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3", "stablelm")
GRANITE = dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0156, logits_scaling=8.0)
TEXT, SIDE, PADDING = 5, 4, 3
LENGTH = PADDING + 2 * TEXT + SIDE**2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small products: more threads than cores wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs() -> dict:
    """Two samples with an image each, the second with padding before it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE_TOKEN, (2, LENGTH), generator=generator)
    ids[:, PADDING + TEXT : PADDING + TEXT + SIDE**2] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 16, 16, generator=generator))


@torch.no_grad()
def logits(model) -> list[torch.Tensor]:
    """Of the rows that are no padding, of a prompt, of the prompt alone without padding, and of a decode step."""
    call, step = inputs(), torch.full((2, 1), VOCAB // 2)
    out = model(**call, use_cache=True)
    mask = torch.cat([call["attention_mask"], torch.ones_like(step)], 1)
    after = model(input_ids=step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
    alone = model(input_ids=call["input_ids"][:1], pixel_values=call["pixel_values"][:1])
    return [out.logits[call["attention_mask"].bool()], alone.logits, after.logits]


def refused(model) -> str | None:
    """What `patch` says against a model, which is then as it was; None if it takes it."""
    try:
        vis_sparse.patch(model, "dense")
    except PatchError as error:
        assert "\n" not in str(error) and vis_sparse.inspect(model) is None
        return str(error)
    return None


def check_right(model) -> None:
    """A patched model computes what the unpatched one does."""
    actual = logits(model)
    assert vis_sparse.inspect(model)["last_call"] is not None, "nothing ran in lanes"
    with unpatched(model):
        expected = logits(model)
    for given, right in zip(actual, expected, strict=True):
        error = float((given - right).abs().max() / right.square().mean().sqrt())
        assert error < 1e-4, f"off by {error:.2g} of the size of the logits"


_FAST = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "glm", "helium", "smollm3", "gemma3_text", "mixtral")


@pytest.mark.every
@pytest.mark.parametrize("kind", slow_but(_FAST, TYPES))
def test_right_or_refused(kind):
    try:
        model = llava(text_config(kind))
    except NoTextModel:
        return  # transformers makes no LLaVA of it
    except NotBuilt as why:
        pytest.skip(f"{kind}: {why}")
    message = refused(model)
    if message is None:
        check_right(model)
    assert (message is None) >= (kind in RIGHT), message
    assert kind not in DISGUISED or "differs from its lanes" in message


@pytest.mark.parametrize("wrap", [buffers_only, lora, torchao_activations])
@pytest.mark.parametrize("kind", DISGUISED)
def test_no_disguise_in_wrapped_layers(kind, wrap):
    """Layers that are not plain are compared as closely as they compute."""
    assert "differs from its lanes" in refused(wrap(llava(text_config(kind))))
    assert refused(wrap(llava(text_config("llama")))) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIGHT)
def test_right_or_refused_with_other_settings(kind):
    """None hides behind its default."""
    for settings in odd_settings(kind):
        try:
            model = llava(text_config(kind, **settings))
            logits(model)
        except Exception:  # settings that transformers itself takes none of
            continue
        if refused(model) is None:
            check_right(model)


def test_most_types_are_built():
    def is_built(kind) -> bool:
        try:
            llava(text_config(kind))
        except NoTextModel:
            return True
        except NotBuilt:
            return False
        return True

    some = TYPES[::8]
    assert np.mean([is_built(kind) for kind in some]) > 0.8


@pytest.mark.parametrize("name", GRANITE)
def test_granite_with_its_multipliers(name):
    """What scales inside attention is read; what scales rows is refused, with the layer; what scales logits is not the
    text model's."""
    model = llava(text_config("granite", **{name: GRANITE[name]}))
    message = refused(model)
    if name in ("attention_multiplier", "logits_scaling"):
        assert message is None
        check_right(model)
    else:
        assert f"{name}={GRANITE[name]}" in message
        where = "before its first layer" if name == "embedding_multiplier" else "first in layer 0"
        assert where in message


def test_granite_as_published_is_refused():
    assert "residual_multiplier=0.22" in refused(llava(text_config("granite", **GRANITE)))


def test_what_is_done_from_a_position_on_is_seen():
    """Ministral 3 scales queries from `original_max_position_embeddings` on."""
    rope = dict(
        rope_type="yarn",
        rope_theta=10_000.0,
        factor=16.0,
        original_max_position_embeddings=16,
        max_position_embeddings=256,
        beta_fast=32.0,
        beta_slow=1.0,
        llama_4_scaling_beta=0.1,
    )
    assert "differs from its lanes" in refused(llava(text_config("ministral3", rope_parameters=rope)))
    model = llava(text_config("ministral3", rope_parameters=rope | dict(llama_4_scaling_beta=0.0)))
    assert refused(model) is None
    check_right(model)


def test_the_check_leaves_rotary_embeddings_as_they_were():
    """Some of them keep what they were called with last."""
    rope = dict(rope_type="dynamic", rope_theta=10_000.0, factor=4.0)
    model = llava(text_config("llama", rope_parameters=rope))
    rotary = model.model.language_model.rotary_emb
    before = {name: value.clone() for name, value in rotary.named_buffers()} | dict(cached=rotary.max_seq_len_cached)
    assert refused(model) is None
    assert model.model.language_model.rotary_emb is rotary and rotary.max_seq_len_cached == before.pop("cached")
    assert all(torch.equal(value, before[name]) for name, value in rotary.named_buffers())
    check_right(model)


def test_a_middle_layer_that_differs_by_its_number_is_seen():
    model = llava(text_config("llama", num_hidden_layers=12))
    attention = type(model.model.language_model.layers[0].self_attn)

    class Numbered(attention):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return (2 * out if self.layer_idx % 4 == 3 else out), weights

    for layer in model.model.language_model.layers:
        layer.self_attn.__class__ = Numbered
    assert "first in layer 3" in refused(model)


def mistral(window: int):
    model = llava(text_config("mistral", sliding_window=window))
    assert refused(model) is None
    return model


def test_a_window_as_long_as_the_sequence_is_none():
    check_right(mistral(LENGTH + 1))


@torch.no_grad()
def test_a_window_that_is_full_is_refused_at_the_call():
    model = mistral(LENGTH - 1)
    with pytest.raises(PatchError, match=f"sliding_window: got {LENGTH} columns, expected at most the {LENGTH - 1} of"):
        model(**inputs())


@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_decoding_up_to_the_window_and_no_further(steps):
    model = mistral(LENGTH + 2)
    call, cache = inputs(), None
    call = {name: value[:1] for name, value in call.items() if name != "attention_mask"}
    with unpatched(model):
        expected = model.generate(**call, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(**call, max_new_tokens=3, min_new_tokens=3, do_sample=False), expected)
    cache = model(**call, use_cache=True).past_key_values
    for step in range(steps):
        token = dict(input_ids=torch.full((1, 1), 7), past_key_values=cache, use_cache=True)
        if step < 2:
            model(**token)
            continue
        with pytest.raises(PatchError, match=f"sliding_window: got {LENGTH + 3} columns"):
            model(**token)
