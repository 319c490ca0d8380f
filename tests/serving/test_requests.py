"""Settings, a request's plan and layout, salts, Model Runner V2's notes, what a plan saves: no engine, no model."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from vis_sparse.plans.carried import to_block
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood, TokenBudget
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.serving import engine
from vis_sparse.serving.engine import _supported
from vis_sparse.serving.errors import ServingError
from vis_sparse.serving.kinds import ALL, READ, TEXT, layer_kinds
from vis_sparse.serving.model_state import planned_state
from vis_sparse.serving.refusals import check_engine
from vis_sparse.serving.requests import NOTE, asked_plan, note_of, salted, visual_ranges
from vis_sparse.serving.runtime import Runtime
from vis_sparse.serving.savings import Savings
from vis_sparse.serving.settings import Loaded, TextShape, is_loaded, read_carried, read_settings

SHAPE = TextShape(layers=8, heads=8, kv_heads=4, ffn=48)


def plan(*layers, **changes):
    return VisualPlan(layers, "p", **changes)


def test_the_kinds_of_layers():
    kinds = layer_kinds([VisualPlan.vica(4, [0, 2]), VisualPlan.dense(4), VisualPlan.vtw(4, 2)], 8, 4, 48)
    assert [layer.attention for layer in kinds] == [
        (READ, ALL, ALL),
        (TEXT, ALL, READ),
        (READ, ALL, TEXT),
        (TEXT, ALL, TEXT),
    ]
    # the last layer in which text reads them changes them no more
    assert [layer.neurons for layer in kinds] == [(0, 48, 48), (0, 48, 0), (0, 48, 0), (0, 48, 0)]
    assert not any(layer.is_dense for layer in kinds)
    assert layer_kinds([VisualPlan.dense(1)], 8, 4, 48)[0].is_dense


@pytest.mark.parametrize(
    "bad, word",
    [
        (plan(LayerPlan(attention=Neighborhood(2))), "neighborhood"),
        (plan(LayerPlan(heads=(True,) * 7 + (False,))), "heads: got a mask"),
        (plan(LayerPlan(tokens=TokenBudget(0.5)), LayerPlan()), "tokens: got"),
        (plan(LayerPlan(), semantics="zero"), "semantics"),
        (plan(LayerPlan(), tower=plan(LayerPlan())), "tower: got a section for the vision encoder"),
        (plan(LayerPlan(text_reads=False), LayerPlan()), "attention full with text_reads off"),
    ],
)
def test_plans_that_an_engine_cannot_run_are_refused(bad, word):
    with pytest.raises(ServingError, match=word):
        layer_kinds([bad], 8, 4, 48)


def test_a_mask_of_all_heads_is_no_mask():
    assert layer_kinds([plan(LayerPlan(heads=(True,) * 8))], 8, 4, 48)[0].is_dense


def test_settings(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\nlayers: {4-: {attention: none, ffn: [1, 5]}}\n")
    loaded = read_settings({"plan": "vica", "plans": [str(tmp_path / "mine.yaml")]}, SHAPE, 32)
    assert loaded.names == ("vica", "mine", "dense") and loaded.block == 32
    block = loaded.to_block()
    assert is_loaded(block) and not is_loaded({"plan": "vica"}) and not is_loaded(None)
    assert Loaded.from_block(block) == loaded  # what a worker reads, without the file
    assert [loaded.index(name) for name in (None, "vica", "mine", "dense")] == [0, 0, 1, 2]
    assert read_settings({"plan": "dense"}, SHAPE, 16).names == ("dense",)


@pytest.mark.parametrize(
    "block, word",
    [
        ("vica", "expected a mapping"),
        ({}, 'got no "plan"'),
        ({"plan": "vika"}, "did you mean 'vica'"),
        ({"plan": "vica", "plan_s": []}, "did you mean 'plans'"),
        ({"plan": "vica", "plans": "vtw"}, "expected a list"),
        ({"plan": "vica", "plans": ["vica"]}, "twice"),
        ({"plan": "hollow"}, "neighborhood"),
        ({"plan": "yopo-12"}, "no head scores"),
        ({"plan": "fastv"}, "tokens"),
        ({"plan": 3}, "plan: got 3"),
        ({"plan": "vica", "calibration": "nowhere.safetensors"}, "nowhere"),
    ],
)
def test_settings_that_are_refused(block, word):
    with pytest.raises(ServingError, match=word):
        read_settings(block, SHAPE, 32)


def test_a_checkpoints_own_plans():
    carried = to_block({"fast": VisualPlan.vica(8, [1]), "exact": VisualPlan.dense(8)}, 8, 48)
    loaded = read_carried(carried, SHAPE, 32)
    assert loaded.names == ("fast", "exact", "dense") and loaded.plans[0].layers == VisualPlan.vica(8, [1]).layers
    near = to_block({"yopo": VisualPlan.yopo(8)}, 8, 48)
    with pytest.raises(ServingError, match="neighborhood.*the checkpoint carries this plan: give vis_sparse"):
        read_carried(near, SHAPE, 32)
    with pytest.raises(ServingError, match="expected what a patched model's save_pretrained writes"):
        read_carried({"plan": "vica"}, SHAPE, 32)


def test_a_plan_of_too_many_neurons_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\ndefault: {ffn: [48]}\n")
    with pytest.raises(ServingError, match="neuron 48"):
        read_settings({"plan": str(tmp_path / "mine.yaml")}, SHAPE, 32)


LOADED = Loaded((VisualPlan.vica(8, [0]), VisualPlan.dense(8)), 32)


def test_a_requests_note():
    assert note_of(LOADED, [], None) == {"plan": 0, "compact": False}
    assert note_of(LOADED, [(3, 66)], "dense") == {"plan": 1, "compact": False}
    # two ranges that touch are one run of 64, each alone is broken
    assert note_of(LOADED, [(3, 33), (34, 66)], "vica") == {"plan": 0, "compact": False}
    assert note_of(LOADED, [(3, 65)], "vica") == {"plan": 0, "compact": True}
    with pytest.raises(ServingError, match="got 'vtw', expected one of the plans that the engine loaded: vica, dense"):
        note_of(LOADED, [], "vtw")
    with pytest.raises(ServingError, match="expected one of"):
        note_of(LOADED, [], ["dense"])


def test_salts_keep_plans_apart():
    lays_out = frozenset([0])
    default, dense = {"plan": 0, "compact": False}, {"plan": 1, "compact": False}
    assert salted(default, None, LOADED, lays_out) is None and salted(default, "s", LOADED, lays_out) == "s"
    assert salted(dense, None, LOADED, lays_out) == "vis_sparse:dense"
    assert salted(dense, "s", LOADED, lays_out) == "s|vis_sparse:dense"
    alone = [salted({"plan": 0, "compact": True}, None, LOADED, lays_out) for _ in range(2)]
    assert alone[0] != alone[1]  # shares with nobody
    assert salted({"plan": 1, "compact": True}, None, LOADED, lays_out) == "vis_sparse:dense"


def test_what_a_client_asks():
    assert asked_plan(None) is None and asked_plan({"other": 1}) is None
    assert asked_plan({"vis_sparse_plan": "dense"}) == "dense"
    with pytest.raises(ServingError, match="expected vis_sparse_plan"):
        asked_plan({NOTE: {"plan": 0}})


def feature(modality, first, last):
    place = SimpleNamespace(extract_embeds_range=lambda: [(first, last)])
    return SimpleNamespace(modality=modality, mm_position=place)


def test_audio_is_text():
    features = [feature("image", 2, 5), feature("audio", 7, 9), feature("video", 11, 12)]
    assert visual_ranges(features) == [(2, 5), (11, 12)]


def test_the_state_of_model_runner_v2():
    """Requests come and go, dummies and padding in between: the step knows its visual rows."""
    runtime = Runtime(LOADED, SHAPE)

    class State:
        def __init__(self, vllm_config):
            self.calls = []

        def add_request(self, index, request):
            self.calls.append("add")

        def remove_request(self, request_id):
            self.calls.append("remove")

        def prepare_attn(self, batch, mode):
            return runtime.step, mode

    config = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=True))
    state = planned_state(State, runtime)(config)

    def request(name, features, note):
        params = SimpleNamespace(extra_args={NOTE: note})
        return SimpleNamespace(req_id=name, mm_features=features, sampling_params=params)

    def batch(names, counts, lengths):
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        bound = SimpleNamespace(numpy=lambda: np.array(lengths, np.int32))
        return SimpleNamespace(
            req_ids=names, num_reqs=len(names), query_start_loc_np=starts, seq_lens_cpu_upper_bound=bound
        )

    state.add_request(0, request("a", [feature("image", 1, 32)], {"plan": 0, "compact": False}))
    state.add_request(1, request("b", [feature("image", 0, 1)], {"plan": 1, "compact": True}))
    step, mode = state.prepare_attn(batch(["b", "a"], [3, 4], [3, 34]), "mode")
    assert mode == "mode"
    assert step.visual.tolist() == [True, True, False, True, True, True, False]
    assert step.plan.tolist() == [1, 1, 1, 0, 0, 0, 0] and step.batch.compact.tolist() == [True, False]
    state.remove_request("b")
    state.add_request(1, request("b", [], {"plan": 0, "compact": False}))  # the same name, another request
    step, _ = state.prepare_attn(batch(["b", "a"], [3, 1], [3, 35]), "mode")
    assert not step.has_visual and step.batch.plans.tolist() == [0, 0]
    step, _ = state.prepare_attn(batch(["req_0_dummy"], [5], [5]), "mode")
    assert not step.has_visual and step.num_rows == 5
    assert state.calls == ["add", "add", "remove", "add"]


def test_a_batch_that_stays_is_not_read_again():
    runtime, asked = Runtime(LOADED, SHAPE), []

    def facts(member):
        asked.append(member)
        return [(1, 32)], 0, False

    members = [object(), object()]
    runtime.begin(members, facts, np.array([0, 1, 2]), np.array([40, 50]))
    runtime.begin(list(members), facts, np.array([0, 1, 2]), np.array([41, 51]))
    assert len(asked) == 2 and runtime.take_step().end.tolist() == [41, 51] and runtime.take_step() is None
    runtime.begin([members[0], object()], facts, np.array([0, 1, 2]), np.array([42, 3]))
    assert len(asked) == 4
    runtime.begin(members[:1], facts, np.array([0, 1, 1]), np.array([43, 0]))  # one row of padding
    assert len(asked) == 5 and runtime.step.batch.starts.shape == (2, 1)


def test_what_a_plan_saves():
    shape = TextShape(4, 8, 4, 48)
    kinds = layer_kinds([VisualPlan.vica(4, [0, 2]), plan(*[LayerPlan(ffn=0.5)] * 3, LayerPlan.off())], 8, 4, 48)
    assert Savings.of(kinds, 0, shape.ffn) == Savings(4, 4, 4.0, 2)
    # the last layer that is read needs no row behind it
    assert Savings.of(kinds, 1, shape.ffn) == Savings(4, 2, 3.0, 1)
    assert Savings.of(kinds, 0, 48).line("vica") == (
        "plan 'vica' leaves out, of each visual token, 4 of 4 attention rows, 4.0 of 4 FFN rows, and its keys in "
        "2 of 4 layers"
    )


def test_versions():
    assert _supported("0.32.0") and _supported("0.32.1+cpu") and not _supported("0.33.0") and not _supported("0.3")


def engine_config(**changes):
    """A VllmConfig of LLaVA with nothing unusual but `changes`, by dotted name."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            architecture="LlavaForConditionalGeneration", hf_text_config=SimpleNamespace(), enable_prompt_embeds=False,
            quantization=None, get_sliding_window=lambda: None, is_mm_prefix_lm=False, use_mla=False, is_hybrid=False,
            is_attention_free=False, runner_type="generate",
            multimodal_config=SimpleNamespace(video_pruning_rate=None, language_model_only=False),
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1,
            enable_dbo=False, use_ubatching=False,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False, cache_dtype="auto"),
        lora_config=None, speculative_config=None, kv_transfer_config=None, ec_transfer_config=None,
    )  # fmt: skip
    for name, value in changes.items():
        *path, last = name.split("__")
        owner = config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return config


@pytest.mark.parametrize(
    "change, value, word",
    [
        ("lora_config", 1, "LoRA"),
        ("speculative_config", 1, "speculative"),
        ("parallel_config__pipeline_parallel_size", 2, "pipeline"),
        ("parallel_config__decode_context_parallel_size", 2, "decode context"),
        ("parallel_config__prefill_context_parallel_size", 2, "prefill context"),
        ("parallel_config__use_ubatching", True, "microbatches"),
        ("kv_transfer_config", 1, "KV connector"),
        ("ec_transfer_config", 1, "encoder cache"),
        ("model_config__enable_prompt_embeds", True, "prompt embeddings"),
        ("model_config__multimodal_config__video_pruning_rate", 0.5, "video token pruning"),
        ("model_config__quantization", "awq", "quantised"),
        ("model_config__get_sliding_window", lambda: 4096, "sliding-window"),
        ("model_config__is_mm_prefix_lm", True, "bidirectional"),
        ("model_config__use_mla", True, "latent"),
        ("model_config__is_hybrid", True, "hybrid"),
        ("model_config__runner_type", "pooling", "pooling"),
        ("model_config__architecture", "Gemma3ForConditionalGeneration", "Gemma3"),
        ("model_config__hf_text_config__alibi", True, "ALiBi"),
        ("cache_config__cache_dtype", "fp8", "quantised KV cache"),
        ("cache_config__kv_sharing_fast_prefill", True, "fast prefill"),
        ("model_config__multimodal_config__language_model_only", True, "text-only"),
    ],
)
def test_engines_that_are_refused(change, value, word):
    check_engine(engine_config())
    with pytest.raises(ServingError, match=word):
        check_engine(engine_config(**{change: value}))


def arriving(monkeypatch, asked, counted=None, one_table=False, **changes):
    """A request, as it leaves the plug-in's hold on vLLM's input processor, and the images that were taken back.

    counted: a list that takes what metrics are told. one_table: the engine keeps one block table for all layers.
    """
    taken_back = []
    monkeypatch.setattr(engine, "count", lambda *args: counted is None or counted.append(args))
    errors = SimpleNamespace(VLLMValidationError=type("VLLMValidationError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(exceptions=errors))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", errors)
    text = SimpleNamespace(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, intermediate_size=48)
    processor = SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={"vis_sparse": LOADED.to_block()},
            model_config=SimpleNamespace(hf_text_config=text),
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=one_table),
        ),
        renderer=SimpleNamespace(mm_processor_cache=SimpleNamespace(invalidate=taken_back.append)),
    )
    image = feature("image", 2, 10)
    image.mm_hash = "image"
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args=asked, skip_reading_prefix_cache=None), mm_features=[image],
        cache_salt=None, resumable=False, prompt_token_ids=[1] * 40,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(request, name, value)
    try:
        return engine._noted(lambda processor: request, processor), taken_back
    except errors.VLLMValidationError as error:
        return str(error), taken_back


def test_a_request_is_noted_where_it_comes_in(monkeypatch):
    request, taken_back = arriving(monkeypatch, {"vis_sparse_plan": "dense", "other": 1})
    assert request.sampling_params.extra_args == {"other": 1, NOTE: {"plan": 1, "compact": True}}
    assert request.cache_salt == "vis_sparse:dense" and not taken_back
    assert request.sampling_params.skip_reading_prefix_cache is None  # dense layers keep every key where it was
    request, _ = arriving(monkeypatch, None)
    assert request.sampling_params.skip_reading_prefix_cache and request.cache_salt
    pooling, _ = arriving(monkeypatch, None, sampling_params=None)
    assert pooling.cache_salt is None


def test_what_metrics_are_told(monkeypatch):
    """40 tokens, 9 of them an image's: one block of 32 less than two, in 7 of 8 layers."""
    counted = []
    arriving(monkeypatch, None, counted)
    arriving(monkeypatch, {"vis_sparse_plan": "dense"}, counted)
    arriving(monkeypatch, None, counted, one_table=True)
    assert [(plan, visual, blocks) for plan, visual, _, blocks in counted] == [
        ("vica", 9, 7), ("dense", 9, 0), ("vica", 9, 0),
    ]  # fmt: skip


def test_a_rejected_request_gives_its_images_back(monkeypatch):
    said, taken_back = arriving(monkeypatch, {"vis_sparse_plan": "yopo"})
    assert "got 'yopo', expected one of the plans" in said and taken_back == ["image"]
    said, taken_back = arriving(monkeypatch, None, resumable=True)
    assert "resumable" in said and taken_back == ["image"]
