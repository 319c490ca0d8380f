"""Samples: records as the inputs of a model.

A sample is the arguments of one call of the model, batch 1, as its processor makes them, with `labels` (1, length) in
transformers' convention: the answer's tokens at their columns, -100 elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .records import Record, decoded

NO_LABEL = -100


def encode(processor, record: Record) -> dict:
    """The sample of a record: the model's inputs by its processor and chat template, with `labels` if it has an answer.

    An answer ends with the tokenizer's end token, as `generate` would end it.
    """
    content = [{"type": "image"}, {"type": "text", "text": record.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = dict(processor(images=[_opened(record.image)], text=[text], return_tensors="pt"))
    if record.answer is None:
        return inputs
    tokens = processor.tokenizer(record.answer, add_special_tokens=False)["input_ids"]
    return with_answer(inputs, torch.tensor([*tokens, processor.tokenizer.eos_token_id]))


def _opened(image):
    return decoded(Path(image), str(image)) if isinstance(image, str | Path) else image.convert("RGB")


def with_answer(inputs: dict, answer: torch.Tensor) -> dict:
    """Inputs of a prompt (batch 1) followed by the tokens of an answer (tokens,), with `labels`."""
    prompt = inputs["input_ids"]
    answer = answer.to(prompt.device)[None]
    extended = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == prompt.shape:
            # what stands beside the tokens (token types, ...) is 0 at text; the mask is 1 at real tokens
            more = answer if name == "input_ids" else torch.full_like(answer, name == "attention_mask")
            value = torch.cat([value, more.to(value.dtype)], 1)
        extended[name] = value
    return extended | {"labels": torch.cat([torch.full_like(prompt, NO_LABEL), answer], 1)}


@torch.no_grad()
def answered(model: nn.Module, sample: dict, max_new_tokens: int) -> dict:
    """The sample, with the model's own greedy answer if it has no `labels`."""
    if sample.get("labels") is not None:
        return sample
    prompt = {name: value for name, value in sample.items() if name != "labels"}
    tokens = model.generate(**prompt, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    return with_answer(prompt, tokens[0, prompt["input_ids"].shape[1] :])


def answer_rows(sample: dict) -> torch.Tensor:
    """Columns of the rows that predict the answer's tokens, ascending."""
    return (sample["labels"][0, 1:] != NO_LABEL).nonzero()[:, 0]


def on_device(sample: dict, model: nn.Module) -> dict:
    """The sample's tensors on the model's device, floating ones in its dtype."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)

    return {name: moved(value) if isinstance(value, torch.Tensor) else value for name, value in sample.items()}
