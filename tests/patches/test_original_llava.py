"""The original `llava` package: its own classes, vision tower and splicing, and the official YOPO code's numbers."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import vis_sparse
from vis_sparse.executor.before_scores import relevance
from vis_sparse.executor.tokens import entering
from vis_sparse.executor.transformers_internals import CACHE
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.layout.packing import visual_coordinates
from vis_sparse.patches.errors import PatchError
from vis_sparse.plans.before import TokensBefore
from vis_sparse.plans.layer_plan import PlanError
from vis_sparse.plans.plan import VisualPlan

from .. import goldens, oracle
from ..executor.test_goldens import GRID
from ..models import random_plan
from .cases import CLIP, LAYERS, TEXT

pytest.importorskip("llava", reason="the original package is not installed (pip install --no-deps llava-torch)")
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM

IMAGE = -200
# transformers 5.24 calls a model with its cache as `cache`, which the package's forward does not take
GENERATES = CACHE == "past_key_values"
generates = pytest.mark.skipif(not GENERATES, reason="the package itself does not generate on this transformers")
CLASSES = {"llama": (LlavaLlamaForCausalLM, LlavaConfig), "mistral": (LlavaMistralForCausalLM, LlavaMistralConfig)}
BASE = (1, 4, 4)
PLAIN = torch.Size([3, 16, 16])


def pictures(*tiles):
    """4-D for plain images; for AnyRes a list with (tiles, 3, 16, 16) of each."""
    generator = torch.Generator().manual_seed(5)
    if not tiles or isinstance(tiles[0], str):
        return torch.randn(len(tiles), *PLAIN, generator=generator)
    return [torch.randn(count, *PLAIN, generator=generator) for count in tiles]


UNPAD = dict(
    mm_patch_merge_type="spatial_unpad",
    image_aspect_ratio="anyres",
    image_grid_pinpoints=[[32, 16], [16, 32], [32, 32]],
)
ONE = [5, 6, 7, IMAGE, 8, 9]
SCENARIOS = {
    # samples, grids of each with the column they start at, images, sizes in pixels, settings
    "one": ([ONE], [[(3, BASE)]], pictures("a"), None, {}),
    "two": ([[5, IMAGE, 6, IMAGE, 7]], [[(1, BASE), (18, BASE)]], pictures("a", "b"), None, {}),
    "right padding": ([ONE, [5, IMAGE, 7]], [[(3, BASE)], [(1, BASE)]], pictures("a", "b"), None, {}),
    "left padding": (
        [ONE, [5, IMAGE, 7]],
        [[(3, BASE)], [(4, BASE)]],
        pictures("a", "b"),
        None,
        dict(tokenizer_padding_side="left"),
    ),
    "mixed": (
        [ONE, [5, 6, 7, 8]],
        [[(3, BASE)], []],
        pictures("a", "skipped"),
        None,
        dict(tokenizer_padding_side="left"),
    ),
    "anyres": ([ONE], [[(3, BASE), (19, (1, 6, 9))]], pictures(5), [(30, 20)], UNPAD),
    "anyres-two": (
        [[5, IMAGE, 6, IMAGE, 7]],
        [[(1, BASE), (17, (1, 8, 5)), (58, BASE), (74, (1, 1, 1))]],
        pictures(3, 1),
        [(16, 40), (16, 16)],
        UNPAD,
    ),
}
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
every_class = pytest.mark.parametrize("name", CLASSES)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A real vision tower, which the package finds by its folder."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def build(name, tower, dtype, **settings):
    model_class, config_class = CLASSES[name]
    config = config_class(
        **TEXT | dict(sliding_window=None) if name == "mistral" else TEXT,
        mm_vision_tower=str(tower),
        mm_vision_select_layer=-1,
        mm_hidden_size=32,
        mm_projector_type="mlp2x_gelu",
        **settings,
    )
    config.pretraining_tp = 1
    model = model_class(config)
    model.get_vision_tower().load_model()
    generator = torch.Generator().manual_seed(0)
    for parameter, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = 1 + 0.2 * noise if "norm" in parameter and parameter.endswith("weight") else 0.15 * noise
    return model.eval().to(dtype)


def call_of(scenario, dtype):
    samples, grids, images, sizes, settings = scenario
    length = max(map(len, samples))
    # the package removes the padding of the ids, wherever it is
    ids = torch.tensor([sample + [0] * (length - len(sample)) for sample in samples])
    mask = torch.tensor([[1] * len(sample) + [0] * (length - len(sample)) for sample in samples])
    images = [image.to(dtype) for image in images] if isinstance(images, list) else images.to(dtype)
    call = dict(attention_mask=mask, images=images, image_sizes=sizes)
    return ids, call, VisualLayout.from_grids(grids), settings


@every_class
@every_scenario
@torch.no_grad()
def test_dense_plan_is_the_unpatched_model(scenario, name, tower):
    ids, call, layout, settings = call_of(scenario, torch.float32)
    expected, model = (build(name, tower, torch.float32, **settings) for _ in range(2))
    vis_sparse.patch(model, "dense")
    mask = spliced(expected, ids, call)[1].bool()
    difference = (model(ids, **call).logits - expected(ids, **call).logits).abs()
    assert difference[mask].max() <= 1e-4
    assert vis_sparse.inspect(model)["last_call"].layout == layout
    # rows of padding, from which right-padded samples would go on, are nobody's business
    for beams in (1, 3) if GENERATES and mask[:, -1].all() else ():
        settings = dict(max_new_tokens=4, do_sample=False, num_beams=beams)
        assert torch.equal(model.generate(ids, **call, **settings), expected.generate(ids, **call, **settings))
    if not GENERATES:
        for one in (expected, model):
            with pytest.raises(TypeError, match="unexpected keyword argument 'cache'"):
                one.generate(ids, **call, max_new_tokens=1)
    vis_sparse.unpatch(model)
    assert torch.equal(model(ids, **call).logits, expected(ids, **call).logits)
    assert "generate" not in vars(model) and "prepare_inputs_labels_for_multimodal" not in vars(model)


def spliced(model, ids, call):
    """(embeddings, mask) as the package makes them."""
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        ids, None, call["attention_mask"], None, None, call["images"], call["image_sizes"]
    )
    return embeds, mask


@every_class
@every_scenario
@pytest.mark.parametrize("semantics", ["exclude", "zero"])
@torch.no_grad()
def test_random_plan_is_the_oracle(scenario, name, semantics, tower):
    ids, call, layout, settings = call_of(scenario, torch.float64)
    model = build(name, tower, torch.float64, **settings)
    plan = random_plan(2000 + list(SCENARIOS.values()).index(scenario), semantics)
    embeds, mask = spliced(model, ids, call)
    with vis_sparse.patched(model, plan):
        prefill = model(ids, **call).logits
        tokens = model.generate(ids, **call, max_new_tokens=4, do_sample=False) if GENERATES else None

    def close(actual, embeds, mask, positions):
        states = oracle.hidden_states(model.model, plan, layout, embeds, mask, positions)
        expected = states[-1] @ model.lm_head.weight.double().T
        rows = oracle.compared_rows(plan, layout, mask)
        assert (actual - expected)[rows].abs().max() <= 1e-5 * expected[rows].abs().max()
        return expected

    close(prefill, embeds, mask, torch.arange(embeds.shape[1]).expand(len(embeds), -1))
    if tokens is not None and mask.all():
        whole = torch.cat([embeds, model.model.embed_tokens(tokens)], dim=1)
        states = oracle.hidden_states(model.model, plan, layout, whole)
        logits = states[-1] @ model.lm_head.weight.double().T
        assert torch.equal(logits[:, embeds.shape[1] - 1 : -1].argmax(-1), tokens)


@generates
@torch.no_grad()
def test_text_only(tower, recwarn):
    """After a call with an image, no layout is left behind: text runs as before, without a warning."""
    ids, call, _, _ = call_of(SCENARIOS["one"], torch.float32)
    expected, model = (build("llama", tower, torch.float32) for _ in range(2))
    vis_sparse.patch(model, random_plan(2100))
    model.generate(ids, **call, max_new_tokens=2)
    text = torch.arange(20, 20 + spliced(expected, ids, call)[0].shape[1])[None]
    settings = dict(max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(text, **settings), expected.generate(text, **settings))
    assert torch.equal(model(text).logits, expected(text).logits)
    assert not [warning for warning in recwarn if "vis_sparse" in str(warning.message)]


class Features(torch.nn.Module):
    """A vision tower that hands over the images it gets as features."""

    num_patches_per_side, is_loaded = GRID[1], True

    def forward(self, images):
        return images.flatten(1, 2)


def golden_model(z, setting):
    """The golden text rows become tokens of their own, since they are no rows of the golden embedding."""
    text = np.delete(z["inputs_embeds"], np.s_[setting["sprompt_len"] : setting["sprompt_len"] + 576], axis=1)
    fields = (*("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),)
    released = ("attncut_w", "layercut_num", "mlpcut_ratio", "sprompt_len")
    sizes = {field: setting[field] for field in fields + released}
    config = LlavaConfig(**sizes, vocab_size=setting["vocab_size"], rms_norm_eps=setting["rms_norm_eps"])
    config.pretraining_tp = 1
    model = LlavaLlamaForCausalLM(config).eval()
    model.load_state_dict({name[2:]: torch.from_numpy(z[name]) for name in z if name.startswith("w/")})
    table = torch.cat([model.model.embed_tokens.weight, torch.from_numpy(text).flatten(0, 1)])
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(table)
    model.model.vision_tower, model.model.mm_projector = Features(), torch.nn.Identity()
    rows = setting["vocab_size"] + torch.arange(text.shape[0] * text.shape[1]).view(text.shape[:2])
    before = rows[:, : setting["sprompt_len"]]
    return model, torch.cat([before, torch.full_like(rows[:, :1], IMAGE), rows[:, before.shape[1] :]], dim=1)


@pytest.mark.parametrize("case", goldens.YOPO)
@torch.no_grad()
def test_official_numbers(case, tmp_path):
    """A released checkpoint's config and mask file, through the package's own calls."""
    setting, random, results = goldens.load(f"yopo/{case}")
    z = random | results
    model, ids = golden_model(z, setting)
    np.save(tmp_path / "mask.npy", z["headmask"])
    vis_sparse.patch(model, vis_sparse.released_plan(model, tmp_path / "mask.npy"))
    start = setting["sprompt_len"]
    images = torch.from_numpy(z["inputs_embeds"][:, start : start + 576]).unflatten(1, GRID[1:])
    out = model(ids, images=images, use_cache=True)
    expected = torch.from_numpy(z["prefill_logits"])
    torch.testing.assert_close(out.logits[:, z["logits_rows"]], expected, rtol=0, atol=1e-4)
    tokens, steps = (torch.from_numpy(z[f"decode_{kind}"]) for kind in ("tokens", "logits"))
    cache = out.past_key_values
    for step, token in enumerate(tokens.T):
        out = model(token[:, None], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], steps[:, step], rtol=0, atol=1e-4)


def test_released_plan_needs_its_settings():
    model = SimpleNamespace(config=SimpleNamespace(attncut_w=5, layercut_num=2, num_hidden_layers=LAYERS))
    with pytest.raises(PlanError, match="^config: got no mlpcut_ratio, expected"):
        vis_sparse.released_plan(model, np.ones((LAYERS, 8), dtype=bool))
    model.config.mlpcut_ratio = 2
    plan = vis_sparse.released_plan(model, np.ones((LAYERS, 8), dtype=bool))
    assert plan.semantics == "zero" and isinstance(plan, VisualPlan)


@generates
@torch.no_grad()
def test_threads_on_one_model(tower):
    """What is spliced in one thread, in `forward` and in `generate`, is no other's: images elsewhere, and none."""
    model = vis_sparse.patch(build("llama", tower, torch.float64), random_plan(5, layers=LAYERS))
    asked = ([ONE], [[5, IMAGE, 6, IMAGE, 7]], [[5, 6, 7, 8, 9]], [[IMAGE, 4, 3, 2, 1, 5, 6]])
    images = [pictures(*["a"] * max(1, sum(token == IMAGE for token in sample))).double() for (sample,) in asked]
    calls = [(torch.tensor(sample), image) for sample, image in zip(asked, images)]

    def run(ids, image):
        tokens = model.generate(ids, images=image, do_sample=False, max_new_tokens=3)
        return model(ids, images=image).logits, tokens

    expected, wrong = [run(*call) for call in calls], []

    def serve(first: int):
        with torch.no_grad():
            for number in range(first, first + 12):
                index = number % len(calls)
                logits, tokens = run(*calls[index])
                if not torch.allclose(logits, expected[index][0]) or not torch.equal(tokens, expected[index][1]):
                    wrong.append(number)

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("scenario", ["two", "left padding", "anyres"])
@torch.no_grad()
def test_tokens_before_the_decoder(scenario, tower):
    """By what embeddings and places tell; what the package's own tower would have to tell is refused by name."""
    ids, call, layout, settings = call_of(SCENARIOS[scenario], torch.float64)
    model = build("llama", tower, torch.float64, **settings)
    embeds, mask = spliced(model, ids, call)
    positions = torch.arange(embeds.shape[1]).expand(len(embeds), -1)
    whole = visual_coordinates(layout)
    for before in (TokensBefore("stride", 0.4), TokensBefore("relevance", 0.4)):
        plan, scores = VisualPlan.dense(LAYERS).replace(before=before), None
        if before.by == "relevance":
            is_text, scores = mask.bool().clone(), np.zeros(layout.num_visual)
            is_text[whole.sample, whole.column] = False
            for segment in np.unique(whole.segment):
                own = np.flatnonzero(whole.segment == segment)
                sample, rows = whole.sample[own[0]], embeds[whole.sample[own], whole.column[own]]
                scores[own] = relevance(rows, embeds[sample, is_text[sample]], before.count(len(own)))
        kept = entering(before, whole, scores)
        came = torch.ones(mask.shape, dtype=torch.bool)
        came[whole.sample, whole.column] = False
        came[whole.sample[kept], whole.column[kept]] = True
        with vis_sparse.patched(model, plan):
            ours = model(ids, **call).logits
        states = oracle.hidden_states(model.model, plan, layout, embeds, mask, positions, came=came)
        expected = states[-1] @ model.lm_head.weight.double().T
        rows = oracle.compared_rows(plan, layout, mask)
        assert (ours - expected)[rows].abs().max() <= 1e-5 * expected[rows].abs().max()
    for by in ("received", "duplicate"):
        plan = plan.replace(before=TokensBefore(by, None if by == "duplicate" else 0.4))
        with pytest.raises(PatchError, match=f"before.by: got {by} for LlavaLlamaForCausalLM, .* its vision tower"):
            vis_sparse.patch(model, plan)
