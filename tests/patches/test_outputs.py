"""A patched model's outputs, and the name of the cache among its arguments: those of the transformers it runs on."""

import warnings

import pytest
import torch
from transformers import DynamicCache

import vis_sparse
from vis_sparse import PatchError
from vis_sparse.executor.transformers_internals import CACHE
from vis_sparse.patches import unpatched

from ..models import IMAGE, Batch, make_batch, make_model, run

OLD_NAME = "past_key_values"
IS_RENAMED = CACHE != OLD_NAME
SETTINGS = {
    "as it comes": dict(),
    "cache": dict(use_cache=True),
    "no cache": dict(use_cache=False),
    "hidden states": dict(output_hidden_states=True),
    "labels": dict(labels=True),
    "tuple": dict(return_dict=False),
    "tuple with hidden states": dict(return_dict=False, output_hidden_states=True, use_cache=False),
}


@pytest.fixture
def model():
    return vis_sparse.patch(make_model("llama-gqa"), "dense")


@pytest.fixture
def batch(model) -> Batch:
    with unpatched(model):
        return make_batch(model, [(5, IMAGE, 6)])


def text_call(batch: Batch) -> dict:
    return dict(inputs_embeds=batch.embeds, position_ids=batch.position_ids)


def shape_of(output):
    """Names (or places) of an output's parts and what they are."""
    parts = output.items() if isinstance(output, dict) else enumerate(output)
    named = [(name, type(part), len(part) if isinstance(part, tuple) else None) for name, part in parts]
    return type(output), named


@pytest.mark.parametrize("part", ["whole", "outer", "text"])
@pytest.mark.parametrize("case", SETTINGS)
@torch.no_grad()
def test_outputs_have_the_unpatched_models_parts(model, batch, case, part):
    settings = dict(SETTINGS[case])
    if settings.pop("labels", False):
        if part != "whole":
            return
        settings["labels"] = batch.input_ids
    called = dict(whole=model, outer=model.model, text=model.model.language_model)[part]
    call = (text_call(batch) if part == "text" else batch.by_ids()) | settings
    for given in (False, True):

        def output(given=given):
            return called(**call, **({CACHE: DynamicCache()} if given else {}))

        with vis_sparse.use_layout(model, batch.layout):
            actual = output()
        with unpatched(model):
            assert shape_of(actual) == shape_of(output())
    assert vis_sparse.inspect(model)["last_call"] is not None


@pytest.mark.parametrize("name", [CACHE, OLD_NAME])
@pytest.mark.parametrize("part", ["whole", "text"])
@torch.no_grad()
def test_the_cache_by_either_name(model, batch, part, name):
    """By the one that this transformers has, and the older one where it is taken still."""
    step = torch.full((1, 1), 7)
    called = model if part == "whole" else model.model.language_model
    given = dict(input_ids=step) if part == "whole" else dict(inputs_embeds=model.get_input_embeddings()(step))

    def answer(name):
        cache = run(model, batch)[1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = called(**given, **{name: cache})
        said = [str(each.message).split(" for ")[0] for each in caught if OLD_NAME in str(each.message)]
        return out[0], said

    with unpatched(model):
        expected, said = answer(name)
    actual, said_patched = answer(name)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert said_patched == said and bool(said) == (name != CACHE)


@pytest.mark.skipif(IS_RENAMED, reason="`cache` is the argument's name here")
@torch.no_grad()
def test_a_name_that_is_not_known_yet_is_refused(model, batch):
    with pytest.raises(PatchError, match="cache: got DynamicCache.* on a patched model"):
        model(**batch.by_ids(), cache=DynamicCache())


@pytest.mark.skipif(not IS_RENAMED, reason="there is one name here")
@torch.no_grad()
def test_of_both_names_the_new_one_counts(model, batch):
    text_model, cache, other = model.model.language_model, DynamicCache(), DynamicCache()
    with vis_sparse.use_layout(model, batch.layout), pytest.warns(FutureWarning, match="Both"):
        out = text_model(**text_call(batch), cache=cache, past_key_values=other)
    assert out.cache is cache and cache.get_seq_length() == batch.length and not other.layers
