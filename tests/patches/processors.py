"""Real processors around a made-up vocabulary, built without any download."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

WORDS = 60
SPECIAL = {
    "image_token": "<image>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
_NAMES = ["<pad>", "<unk>", *SPECIAL.values(), *(f"w{i}" for i in range(WORDS))]
IDS = {name: index for index, name in enumerate(_NAMES)}
VOCAB = 80


def tokenizer(padding: str = "left") -> PreTrainedTokenizerFast:
    """Words w0, w1, ... between blanks, and the special tokens of every family."""
    words = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side=padding,
        extra_special_tokens=SPECIAL,
    )
