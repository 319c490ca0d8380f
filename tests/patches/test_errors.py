"""Refusals: one line that names the thing, what was given and what was expected, and a model left as it was."""

import re

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import vis_sparse
from vis_sparse import HeadBudget, LayerPlan, LayoutError, PatchError, PlanError, VisualLayout, VisualPlan
from vis_sparse.executor.transformers_internals import CACHE

from ..models import HEADS, IMAGE, IMAGE_TOKEN, LAYERS, NEURONS, VOCAB, make_batch, make_model, random_plan

YOPO = dict(num_layers=LAYERS, window=3, layer_cut=2)


def hooks(model) -> int:
    """Hooks of any kind on any module, and forwards replaced on instances."""
    kinds = [kind for kind in vars(torch.nn.Module()) if kind.endswith("_hooks")]
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds) + sum(
        "forward" in vars(m) for m in model.modules()
    )


def refuses(error, words, call):
    """`call` raises one line in which all `words` occur."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message
    for word in words:
        assert re.search(word, message), f"{word!r} not in {message!r}"


BAD_PATCHES = {
    "depth": (PlanError, ["got 5 layers", f"expected the model's {LAYERS}"], VisualPlan.dense(5), {}),
    "mask-length": (
        PlanError,
        ["heads", "got a mask of 4", f"{HEADS} heads"],
        VisualPlan.yopo(**YOPO, head_mask=[[True] * 4] * LAYERS),
        {},
    ),
    "mask-shape": (
        PlanError,
        ["heads", r"\(2, 8\)", r"\(3, 8\)"],
        VisualPlan.dense(LAYERS),
        dict(heads=torch.ones(2, HEADS, dtype=torch.bool)),
    ),
    "neuron": (
        PlanError,
        ["ffn", f"got neuron {NEURONS}", f"below the model's {NEURONS}"],
        VisualPlan((LayerPlan(ffn=(0, NEURONS)),) * LAYERS),
        {},
    ),
    "budget-without-scores": (
        PlanError,
        ["heads", "keep", "no head scores", "expected heads="],
        VisualPlan((LayerPlan(heads=HeadBudget(2)),) * LAYERS),
        {},
    ),
    "plan-name": (PlanError, ["plan: got 'yopo-13'", "yopo-12"], "yopo-13", {}),
    "plan-type": (PlanError, ["plan: got int", "expected"], 12, {}),
    "heads-file": (PlanError, ["heads", "absent.npy", "existing"], VisualPlan.dense(LAYERS), dict(heads="absent.npy")),
    "backend": (
        PatchError,
        ["backend", "got 'cuda'", "reference", "torch"],
        VisualPlan.dense(LAYERS),
        dict(backend="cuda"),
    ),
}


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("case", BAD_PATCHES)
@torch.no_grad()
def test_bad_patch_changes_nothing(case, patched):
    error, words, plan, settings = BAD_PATCHES[case]
    model = make_model()
    batch = make_batch(model, [(5, IMAGE, 4)])
    if patched:
        vis_sparse.patch(model, random_plan(700))
    # hooks are counted after a call: transformers installs some of its own in the first
    before, hooked = model(**batch.by_ids()).logits, hooks(model)
    refuses(error, words, lambda: vis_sparse.patch(model, plan, **settings))
    assert torch.equal(model(**batch.by_ids()).logits, before)
    assert hooks(model) == hooked


def test_unpatch_leaves_no_hooks():
    model = vis_sparse.patch(make_model(), random_plan(701))
    assert hooks(model) > 0
    assert vis_sparse.unpatch(model) is model
    assert hooks(model) == 0
    assert vis_sparse.unpatch(model) is model, "once more does no harm"


@torch.no_grad()
def test_patched_ends_when_its_body_raises():
    model, clean = make_model(), make_model()
    batch = make_batch(clean, [(5, IMAGE, 4)])
    with pytest.raises(KeyError), vis_sparse.patched(model, random_plan(702)):
        raise KeyError
    assert hooks(model) == 0
    assert torch.equal(model(**batch.by_ids()).logits, clean(**batch.by_ids()).logits)


def text_model(**settings):
    settings = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2) | settings
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **settings))


@pytest.mark.parametrize("make", [text_model, lambda: torch.nn.Linear(2, 2)], ids=["text model", "linear"])
def test_not_a_vlm(make):
    model = make()
    refuses(
        PatchError, [type(model).__name__, "expected", "Llava"], lambda: vis_sparse.patch(model, VisualPlan.dense(2))
    )
    assert hooks(model) == 0


@pytest.mark.parametrize("text", ["mistral-gqa", "qwen2-gqa"])
def test_sliding_window(text):
    settings = dict(sliding_window=8)
    if text == "qwen2-gqa":
        settings |= dict(use_sliding_window=True, max_window_layers=1)
    model = make_model(text, **settings)
    refuses(PatchError, ["sliding"], lambda: vis_sparse.patch(model, VisualPlan.dense(LAYERS)))
    assert hooks(model) == 0


def test_layout_for_an_unpatched_model():
    model = make_model()

    def call():
        with vis_sparse.use_layout(model, VisualLayout(1)):
            pass

    refuses(PatchError, ["use_layout", "not patched", "patch"], call)


# Calls that a patched model refuses. Each must leave it working.


@pytest.fixture
def patched():
    return vis_sparse.patch(make_model(), random_plan(703))


@torch.no_grad()
def check_works_after(model, refused):
    batch = make_batch(make_model(), [(5, IMAGE, 4)])
    before, hooked = model(**batch.by_ids()).logits, hooks(model)
    refused(batch)
    assert hooks(model) == hooked
    assert torch.equal(model(**batch.by_ids()).logits, before)


def test_image_tokens_that_fit_no_grid(patched):
    def refused(batch):
        ids = batch.input_ids.clone()
        ids[0, -1] = IMAGE_TOKEN
        call = dict(input_ids=ids, pixel_values=batch.pixel_values)
        refuses(LayoutError, ["input_ids", "got 17 image tokens", "multiple of 16"], lambda: patched(**call))

    check_works_after(patched, refused)


def test_chunk_that_ends_inside_an_image(patched):
    def refused(batch):
        def call():
            with vis_sparse.use_layout(patched, batch.layout):
                patched(inputs_embeds=batch.embeds[:, :10])

        refuses(LayoutError, ["chunk", "0 to 9", "5 to 20"], call)

    check_works_after(patched, refused)


def test_layout_that_does_not_fit_the_batch(patched):
    def refused(batch):
        def call():
            with vis_sparse.use_layout(patched, VisualLayout(3, batch.layout.segments)):
                patched(inputs_embeds=batch.embeds.repeat(2, 1, 1))

        refuses(LayoutError, ["layout", "batch", "2", "3"], call)

    check_works_after(patched, refused)


def test_output_attentions(patched):
    check_works_after(
        patched,
        lambda batch: refuses(
            PatchError, ["output_attentions", "unpatch"], lambda: patched(**batch.by_ids(), output_attentions=True)
        ),
    )


def test_mask_of_four_dimensions(patched):
    def refused(batch):
        mask = torch.ones(1, 1, batch.length, batch.length, dtype=torch.bool).tril()
        call = batch.by_ids() | dict(attention_mask=mask)
        refuses(PatchError, ["attention_mask", "got 4 dimensions", "expected 2"], lambda: patched(**call))

    check_works_after(patched, refused)


def test_plain_cache_with_an_image_in_it(patched):
    """Filled by an unpatched model: taking its visual keys for text would be silently wrong."""

    def refused(batch):
        cache = DynamicCache(config=patched.config.text_config)
        make_model()(**batch.by_ids(), past_key_values=cache, use_cache=True)
        with vis_sparse.use_layout(patched, batch.layout):
            refuses(LayoutError, ["cache"], lambda: patched(input_ids=torch.ones(1, 1).long(), past_key_values=cache))

    check_works_after(patched, refused)


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
@torch.no_grad()
def test_cache_of_another_plan(semantics):
    """The stores hold other heads then, of the same shape."""
    halves = (True,) * (HEADS // 2) + (False,) * (HEADS // 2)
    one, other = (
        VisualPlan((LayerPlan(heads=heads),) * LAYERS, semantics=semantics) for heads in (halves, halves[::-1])
    )
    model = vis_sparse.patch(make_model("llama-gqa"), one)
    batch = make_batch(make_model("llama-gqa"), [(5, IMAGE, 4)])
    cache = model(**batch.by_ids(), use_cache=True).past_key_values
    token = torch.ones(1, 1, dtype=torch.long)
    with vis_sparse.patched(model, other):
        refuses(
            PatchError,
            [f"{CACHE}: got a cache filled", "plan"],
            lambda: model(input_ids=token, past_key_values=cache, use_cache=True),
        )
    assert model(input_ids=token, past_key_values=cache).logits.isfinite().all(), "its own plan goes on"


def test_cache_of_a_patched_model_in_an_unpatched_one(patched):
    batch = make_batch(make_model(), [(5, IMAGE, 4)])
    with torch.no_grad():
        cache = patched(**batch.by_ids(), use_cache=True).past_key_values
    clean = vis_sparse.unpatch(patched)
    call = dict(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    refuses(RuntimeError, ["cache", "unpatched", "expected"], lambda: clean(**call))


@torch.no_grad()
def test_merged_inputs_without_a_layout_warn_once(patched):
    clean = make_model()
    batch = make_batch(clean, [(5, IMAGE, 4)])
    with pytest.warns(UserWarning, match="use_layout") as caught:
        for _ in range(2):
            assert torch.equal(patched(inputs_embeds=batch.embeds).logits, clean(inputs_embeds=batch.embeds).logits)
    assert len([w for w in caught if "use_layout" in str(w.message)]) == 1
