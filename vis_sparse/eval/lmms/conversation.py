"""Several questions about one document, asked one after the other on a KV cache that is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from lmms_eval.api.instance import Instance
from transformers import DynamicCache

from ...executor.transformers_internals import CACHE
from ...patches import read_layout
from .columns import SampleCost
from .cost_meter import CostMeter, per_sample

Ask = Callable[[list[str]], list[dict] | None]  # the answers so far -> messages of the next turn, None at the end


def turns(request: Instance, document) -> Ask:
    """What a task asks next, from a request for chat messages or for plain prompts (lmms-eval's two protocols)."""
    functions = [argument for argument in request.args if callable(argument)]

    def of_messages(answers: list[str]):
        messages, is_over, *_ = functions[0](document, round_idx=len(answers), previous_output=answers)
        return None if is_over else messages

    def of_prompts(answers: list[str]):
        images, text, is_over = functions[0](document), request.args[0], False
        if answers:
            images, text, is_over, *_ = functions[1](document, round_idx=len(answers), previous_output=answers)
        content = [{"type": "image", "url": image} for image in images or ()]
        return None if is_over else [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    return of_messages if len(functions) == 1 else of_prompts


def converse(meter: CostMeter, processor, ask: Ask, request: Instance) -> tuple[list[str], SampleCost]:
    """The answers, and what the conversation cost in all: rows of text cost the same whether they come at once or turn
    by turn, so its FLOPs are those of a prompt with all its text."""
    model, end = meter.model, processor.tokenizer.eos_token_id
    options = next(argument for argument in request.args if isinstance(argument, dict))
    settings = {"do_sample": False, "max_new_tokens": options.get("max_new_tokens", 128)}
    cache = DynamicCache(config=model.config.get_text_config())
    history, answers, prompt, tokens, seconds = [], [], "", None, 0.0
    while (messages := ask(answers)) is not None:
        before, prompt = prompt, _text(processor, [*history, *messages])
        if tokens is None:
            images = [part["url"] for message in messages for part in message["content"] if part["type"] == "image"]
            inputs = processor(images=images or None, text=[prompt], return_tensors="pt").to(model.device, model.dtype)
            (layout,) = per_sample(read_layout(model, inputs), torch.ones_like(inputs["input_ids"]))
        else:
            said = processor.tokenizer(
                _after(prompt, before, answers[-1]), add_special_tokens=False, return_tensors="pt"
            )["input_ids"]
            tokens = torch.cat([tokens, said.to(tokens.device)], dim=1)
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        tokens, taken = meter.run(**inputs, **{CACHE: cache}, **settings)
        seconds += taken
        if tokens[0, -1] == end:
            tokens = tokens[:, :-1]
        answers.append(processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        history += [*messages, {"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]}]
    text_tokens = cache.get_seq_length() - layout.num_visual
    return answers, replace(meter.cost(layout, text_tokens), seconds=seconds)


def _text(processor, messages: list[dict]) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _after(prompt: str, before: str, answer: str) -> str:
    """What `prompt` says after the prompt `before` it and the answer to that."""
    said = prompt.removeprefix(before)
    start = said.find(answer)
    if len(said) == len(prompt) or start < 0:
        raise ValueError(f"chat template: got {prompt!r} after {before!r}, expected it to go on from there")
    return said[start + len(answer) :]
