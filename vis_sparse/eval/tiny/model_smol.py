"""The deep model: SmolLM2-135M-Instruct behind a small vision tower; its shape, its prompts and what its training needs to know."""

from collections.abc import Sequence
from functools import cache

from transformers import LlavaConfig, LlavaForConditionalGeneration

from vis_sparse.eval.tiny import model_llava, smollm2

NAME, TITLE = "smol", "LLaVA with SmolLM2"
MODEL = LlavaForConditionalGeneration
SIZES = ()  # images as they are drawn
PATCH, GRID = model_llava.PATCH, model_llava.GRID
VISUAL_TOKENS = GRID * GRID
IMAGE, IMAGE_TOKEN = 4, "<reponame>"  # a token that chats have no use for
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""SmolLM2's own system message, which its chat template puts first."""


@cache
def _ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_prefix(tokenizer) -> list[int]:
    """Of a chat, up to the first question."""
    return list(_ids(tokenizer, f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"))


def image_prefix(tokenizer) -> list[int]:
    """Of a chat about an image, up to the first question."""
    return [*text_prefix(tokenizer), *[IMAGE] * VISUAL_TOKENS, *_ids(tokenizer, "\n")]


def end_of_question(tokenizer) -> list[int]:
    return list(_ids(tokenizer, "<|im_end|>\n<|im_start|>assistant\n"))


def end_of_answer(tokenizer) -> list[int]:
    """From an answer's end token to the next question."""
    return list(_ids(tokenizer, "\n<|im_start|>user\n"))


def prompt(question: str) -> str:
    """The text a question is put as, the same as the chat template's."""
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{IMAGE_TOKEN}\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
