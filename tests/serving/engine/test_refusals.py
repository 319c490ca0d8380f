"""What an engine under a plan cannot have ends in one clear error, where the engine is asked for."""

import json

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from vis_sparse.eval.random_checkpoint import random_llava
from vis_sparse.plans.carried import to_block
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.serving.errors import ServingError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    load_general_plugins()
    return random_llava(tmp_path_factory.mktemp("refused") / "llama")


def config(folder, plan="vica", **settings):
    block = {"vis_sparse": plan if isinstance(plan, dict) else {"plan": plan}}
    return EngineArgs(str(folder), dtype="float32", additional_config=block, **settings).create_engine_config()


def test_a_plan_is_read_where_the_engine_is_made(folder):
    made = config(folder)
    assert made.additional_config["vis_sparse"]["block"] == 128  # vLLM's own default on CPUs
    assert [text.splitlines()[0] for text in made.additional_config["vis_sparse"]["loaded"]] == [
        "name: vica",
        "name: dense",
    ]
    assert config(folder, block_size=32).additional_config["vis_sparse"]["block"] == 32


def test_a_checkpoints_own_plan_is_taken_where_nothing_is_said(folder, tmp_path):
    own = {"vis_sparse": to_block({"fast": VisualPlan.vica(8, [1])}, 8, 352)}
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | own))

    def names(**settings):
        made = EngineArgs(str(tmp_path), dtype="float32", **settings).create_engine_config()
        block = made.additional_config.get("vis_sparse")
        return block and [text.splitlines()[0] for text in block["loaded"]]

    assert names() == ["name: fast", "name: dense"]
    assert names(additional_config={"vis_sparse": {"plan": "vtw"}}) == ["name: vtw", "name: dense"]
    assert names(additional_config={"vis_sparse": None}) is None


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"enable_lora": True}, "LoRA"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"language_model_only": True}, "text-only"),
        ({"kv_sharing_fast_prefill": True}, "fast prefill"),
        ({"kv_cache_dtype": "fp8"}, "quantised KV cache"),
        ({"plan": "hollow"}, "neighborhood"),
        ({"plan": "yopo-25"}, "head scores"),
        ({"plan": "fastv"}, "tokens"),
        ({"plan": "nothing"}, "expected a file or one of"),
        ({"plan": {"plan": "vica", "heads": "x"}}, "unknown key 'heads'"),
    ],
)
def test_refused(folder, settings, word):
    with pytest.raises(ServingError, match=word):
        config(folder, **settings)


def test_another_version_is_refused_and_only_with_a_plan(folder, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(ServingError, match="got vLLM 0.33.0, expected 0.32"):
        config(folder)
    assert EngineArgs(str(folder), dtype="float32").create_engine_config().additional_config == {}
