"""An engine that is told nothing: with the plug-in installed it is the engine without it."""

import os

from vis_sparse.eval.random_checkpoint import random_llava

from .running import Ask, answers, engine, has_its_own_forward


def test_without_a_plan_nothing_changes(tmp_path, monkeypatch):
    folder = random_llava(tmp_path / "llama")
    asks = [Ask(i, i % 3, None, prompt_logprobs=5) for i in range(4)]
    found = []
    for plugins in (None, "nothing"):
        if plugins is not None:
            monkeypatch.setenv("VLLM_PLUGINS", plugins)
        with engine(folder, None) as llm:
            assert llm.apply_model(has_its_own_forward) == [True]
            outputs = answers(llm, asks)
        found.append(
            [(o.outputs[0].token_ids, _numbers(o.outputs[0].logprobs), _numbers(o.prompt_logprobs)) for o in outputs]
        )
    assert found[0] == found[1]
    assert os.environ["VLLM_PLUGINS"] == "nothing"


def _numbers(entries):
    return [each and {token: one.logprob for token, one in each.items()} for each in entries]
