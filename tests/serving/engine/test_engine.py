"""One engine, eager: plans alone and in company, chunks of 48 tokens (an image has 64), shared
prefixes, several images and none, log-probabilities of prompts, and the rows that enter each layer."""

import pytest
from vllm.exceptions import VLLMValidationError

from vis_sparse.eval.random_checkpoint import random_llava
from vis_sparse.eval.tiny.words import IMAGE
from vis_sparse.plans.schedule import schedule
from vis_sparse.serving.step import merged_segments
from vis_sparse.serving.tables import empty_columns

from .harness import TOLERANCE, Reference, farthest, plan_files
from .running import DEFAULT, Ask, answers, engine, rows_entered, worst

PLANS = ("vica", "dense", "vtw", "shortv", "vskip", "mix")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("engine") / "llama")


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def against(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def llm(folder, plans):
    with engine(folder, plans) as running:
        yield running


@pytest.mark.parametrize("plan", PLANS)
def test_rows_and_answers_of_a_plan(llm, plan, against, plans):
    """A prompt of one image: what enters each layer is what the schedule says, and what it answers is right."""
    [(before, scheduled)], ask = llm.apply_model(rows_entered), Ask(100 + PLANS.index(plan), 1, plan)
    distance, [output] = worst(llm, [ask], against, plans)
    assert distance < TOLERANCE and not output.num_cached_tokens
    [(after, total)] = llm.apply_model(rows_entered)
    rows = len(output.prompt_token_ids) + ask.tokens - 1
    assert total - scheduled == rows
    config = against.model.config.text_config
    resolved = against.plan(plan, plan_files(plans))
    work = schedule(resolved, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    text = rows - 64
    assert [b - a for a, b in zip(before["attention"], after["attention"])] == [
        rows if item.query_heads else text for item in work
    ]
    assert [b - a for a, b in zip(before["ffn"], after["ffn"])] == [
        rows if item.neurons not in (0, ()) else text for item in work
    ]


def test_company_then_again(llm, against, plans):
    """Requests of all plans in one batch, some without an image; again from shared prefixes; then other endings."""
    asks = [Ask(i, i % 4, PLANS[i % len(PLANS)], words=1 + i % 3) for i in range(12)]
    distance, first = worst(llm, asks, against, plans)
    assert distance < TOLERANCE
    distance, again = worst(llm, asks, against, plans)
    assert distance < TOLERANCE
    assert sum(output.num_cached_tokens for output in again) > sum(output.num_cached_tokens for output in first)
    other = [Ask(ask.seed, ask.images, ask.plan, ask.words, tail=9) for ask in asks]
    distance, ended = worst(llm, other, against, plans)
    assert distance < TOLERANCE and any(output.num_cached_tokens > 64 for output in ended)


def test_plans_share_no_prefix(llm, against, plans):
    """The same prompt under one plan after the other: nothing is taken over, and each says what it must."""
    for plan in PLANS:
        distance, [output] = worst(llm, [Ask(50, 2, plan)], against, plans)
        assert distance < TOLERANCE and output.num_cached_tokens == 0
    [output] = answers(llm, [Ask(50, 2)])
    assert output.num_cached_tokens > 0  # the default is the plan of that name


def test_log_probabilities_of_prompts(llm, against, plans):
    """Also of visual positions: rows that stopped early keep their last value, as in the transformers executor."""
    asks = [Ask(60, 2, plan, prompt_logprobs=60) for plan in ("vica", "mix", "vtw", "dense")]
    distance, outputs = worst(llm, asks, against, plans)
    assert distance < TOLERANCE and all(len(o.prompt_logprobs) == len(o.prompt_token_ids) for o in outputs)


def test_prompts_that_begin_or_end_with_an_image(llm, against, plans):
    asks = [Ask(70, 1, plan, words=0, tail=0, tokens=3) for plan in ("vica", "mix", "dense")]
    assert worst(llm, asks, against, plans)[0] < TOLERANCE


def test_an_unknown_plan_is_an_error_of_its_request(llm, against, plans):
    with pytest.raises(VLLMValidationError, match="got 'yopo-12', expected one of the plans that the engine loaded"):
        answers(llm, [Ask(1, 1, "yopo-12")])
    assert worst(llm, [Ask(1, 1, DEFAULT)], against, plans)[0] < TOLERANCE


def test_preemption(llm, against, plans):
    """Too few blocks for all: some requests lose theirs half way and start again."""
    before = value(llm, "vllm:num_preemptions")
    asks = [Ask(200 + i, 3, ("dense", "vica", "mix")[i % 3], tokens=220) for i in range(6)]
    distance, _ = worst(llm, asks, against, plans)
    assert distance < TOLERANCE and value(llm, "vllm:num_preemptions") > before


def test_aborts_leave_nothing(llm, against, plans):
    """Requests that end in the middle, of their prompt too; those beside them say what they must."""
    core, left = llm.llm_engine, {}
    for index in range(6):
        ask = Ask(300 + index, 1 + index % 3, PLANS[index], tokens=12)
        core.add_request(str(index), ask.prompt, ask.params)
        left[str(index)] = ask
    ended, steps = [], 0
    while left:
        steps += 1
        for output in core.step():
            if output.finished:
                ended.append((output, left.pop(output.request_id)))
        if steps in (2, 4, 9) and left:
            name = sorted(left)[0]
            core.abort_request([name])
            del left[name]
    files = plan_files(plans)
    assert len(ended) >= 3 and value(llm, "vllm:kv_cache_usage_perc") == 0
    for output, ask in ended:
        assert farthest(output, ask.pictures, against.plan(ask.plan, files), against) < TOLERANCE


def held_in_decode(llm, plan: str) -> float:
    """The share of all KV blocks that a request of two images (128 tokens) and some text holds behind its prompt."""
    core, found = llm.llm_engine, []
    ask = Ask(400, 2, plan, tokens=8)
    core.add_request("held", ask.prompt, ask.params)
    while core.has_unfinished_requests():
        core.step()
        found.append(value(llm, "vllm:kv_cache_usage_perc"))
    return max(found)


def test_blocks_of_visual_tokens_are_held_by_the_layers_that_read_them(llm):
    """vica reads images in 2 of 8 layers: the other 6, three groups of 2, have no block that only visual tokens fill.
    What other plans leave out lies in other layers, and no block is given back."""
    ask = Ask(400, 2, "vica", tokens=8)
    [output] = answers(llm, [ask])
    visual = [(i, i) for i, token in enumerate(output.prompt_token_ids) if token == IMAGE]
    assert len(visual) == 128
    columns = -(-(len(output.prompt_token_ids) + ask.tokens - 1) // 32)
    empty = len(empty_columns(merged_segments(visual), 32))
    assert empty >= 2
    held = {plan: round(held_in_decode(llm, plan) * 239) for plan in ("dense", "vica", "vtw")}  # one is the null block
    assert held == {"dense": 4 * columns, "vtw": 4 * columns, "vica": 4 * columns - 3 * empty}


def value(llm, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)
