"""Conversations as a model's inputs: the processor's own chat template, and labels at the answers' tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..calibration.records import SampleError, decoded
from ..calibration.samples import NO_LABEL
from ..plans.layer_plan import brief
from .conversations import Conversation


@dataclass(frozen=True)
class Written:
    """A conversation in the words of a chat template. answers: (first, last + 1) characters of each answer, with the
    token that ends it."""

    text: str
    answers: tuple[tuple[int, int], ...]


class Encoder:
    """Batches of conversations for a processor of images and text.

    Each answer ends with the token that ends a turn in the chat template; where the template has none, with the
    tokenizer's end token, as `generate` ends it. most_tokens: longer sequences are cut off there, unless an image is.
    """

    def __init__(self, processor, most_tokens: int | None = None):
        self.processor, self.most_tokens = processor, most_tokens
        self._tokenizer = processor.tokenizer
        if not self._tokenizer.is_fast:
            raise SampleError(
                f"processor: got a {type(self._tokenizer).__name__}, expected a fast tokenizer (labels need to know "
                "which characters a token is of)"
            )
        self._placeholder = self._tokenizer.convert_tokens_to_ids(processor.image_token)

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        """The inputs of a batch, padded on the right, with `labels` (batch, length)."""
        written = [self.written(conversation) for conversation in conversations]
        images = [decoded(image, str(image)) for conversation in conversations for image in conversation.images]
        inputs = dict(
            self.processor(
                images=images or None,
                text=[each.text for each in written],
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
        )
        labels = torch.full_like(inputs["input_ids"], NO_LABEL)
        for row, (each, ids, mask) in enumerate(zip(written, inputs["input_ids"], inputs["attention_mask"])):
            columns = self._answer_columns(each, ids[mask.bool()].tolist())
            labels[row, columns] = ids[columns]
        return self._cut({**inputs, "labels": labels})

    def written(self, conversation: Conversation) -> Written:
        """The conversation by the chat template. Raises SampleError for a template that does not go on from turn to
        turn, so that nobody could say which words are the answer."""
        text, answers, until = "", [], ""
        for index in conversation.answers:
            prompt = self._rendered(conversation.messages[:index], asks=True)
            whole = self._rendered(conversation.messages[: index + 1])
            if not (prompt.startswith(until) and whole.startswith(prompt)):
                raise SampleError(
                    f"chat template: got {brief(whole[-200:])} after {brief(prompt[-200:])}, expected an answer to go "
                    "on from its prompt"
                )
            text += prompt[len(until) :]
            said, rest = self._ended(whole[len(prompt) :])
            answers.append((len(text), len(text) + len(said)))
            text, until = text + said + rest, whole
        shown, images = text.count(self.processor.image_token), len(conversation.images)
        if shown != images:
            raise SampleError(
                f"text: got {shown} {self.processor.image_token} for {images} images, expected one for each and none "
                "in what is said"
            )
        return Written(text, tuple(answers))

    def _rendered(self, messages: Sequence[dict], asks: bool = False) -> str:
        return self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)

    def _ended(self, answer: str) -> tuple[str, str]:
        """An answer with the token that ends it, and what the template writes after that."""
        ends = ((answer.find(token), token) for token in self._tokenizer.all_special_tokens)
        start, token = min((each for each in ends if each[0] >= 0), default=(None, ""))
        if start is None:
            return answer.rstrip() + self._tokenizer.eos_token, ""
        return answer[: start + len(token)], answer[start + len(token) :]

    def _answer_columns(self, written: Written, ids: list[int]) -> list[int]:
        """Where the answers' tokens are among the tokens of a sequence, its images in their places."""
        tokens = self._tokenizer(written.text, return_offsets_mapping=True)
        own = tokens["input_ids"]
        places = _places(own, ids, self._placeholder)
        spans = [(stop - len(written.text[start:stop].lstrip()), stop) for start, stop in written.answers]
        return [
            place
            for place, (first, end) in zip(places, tokens["offset_mapping"])
            # a token that begins with the space before an answer is the answer's
            if end > first and any(end > start and first < stop for start, stop in spans)
        ]

    def _cut(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shape, most = inputs["input_ids"].shape, self.most_tokens
        if most is None or shape[1] <= most:
            return inputs
        image = self._tokenizer.convert_tokens_to_ids(self.processor.image_token)
        if bool((inputs["input_ids"][:, most:] == image).any()):
            raise SampleError(f"tokens: got an image after token {most}, expected at most {most} tokens before its end")
        return {name: value[:, :most] if value.shape == shape else value for name, value in inputs.items()}


def _places(short: list[int], full: list[int], placeholder: int) -> list[int]:
    """For each token of `short`, its index in `full`, which has one or more other tokens for each placeholder (-1)."""
    segments, places, at = _split(short, placeholder), [], 0
    for number, segment in enumerate(segments):
        if number and not segment and number < len(segments) - 1:
            places.append(-1)
            continue  # images side by side are one gap
        if number:
            places.append(-1)
            first = at + 1
            at = len(full) - len(segment) if number == len(segments) - 1 else _find(segment, full, first)
        if at < 0 or full[at : at + len(segment)] != segment:
            raise SampleError("tokens: got other text around the images than without them, expected the same")
        places += range(at, at + len(segment))
        at += len(segment)
    return places


def _split(tokens: list[int], separator: int) -> list[list[int]]:
    segments: list[list[int]] = [[]]
    for token in tokens:
        if token == separator:
            segments.append([])
        else:
            segments[-1].append(token)
    return segments


def _find(segment: list[int], full: list[int], start: int) -> int:
    ends = range(start, len(full) - len(segment) + 1)
    return next((at for at in ends if full[at] == segment[0] and full[at : at + len(segment)] == segment), -1)

