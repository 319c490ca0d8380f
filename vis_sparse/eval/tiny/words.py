"""The words of the small models, and their tokenizer: one token a word."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vis_sparse.eval.tiny.data import COLORS, COLUMNS, DIGITS, EMPTY, ROWS, SHAPES

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIAL))
QUESTION_WORDS = (
    "user: assistant: ? yes no not is are there a an the in at of image shape color what which digit does do contain "
    "present how often many appear"
)
WORDS = (*SPECIAL, *QUESTION_WORDS.split(), *DIGITS, *ROWS, *COLUMNS, *SHAPES, *COLORS, EMPTY)
WORD_IDS = {word: i for i, word in enumerate(WORDS)}


def tokenizer(words: tuple[str, ...], special: dict[str, str]) -> PreTrainedTokenizerFast:
    """One token a word, its place in `words` (any case), `<s>` before a text, padding on the left.

    special: special tokens beside the first four, by the name of the tokenizer's attribute ("image_token", ...).
    """
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\?"), "isolated")]
    )
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=special, padding_side="left", model_max_length=1024,
    )


def extended(special: dict[str, str]) -> tuple[str, ...]:
    """`WORDS` at their places, so that the LLaVA's weights fit, with the first of `special` for `<image>`, and the
    others after them."""
    image, *others = special.values()
    return (*WORDS[:IMAGE], image, *WORDS[IMAGE + 1 :], *others)


def chat_template(image: str) -> str:
    """A chat template whose prompt for one question is "USER: `image`\n`question` ASSISTANT:"."""
    return (
        "{% for message in messages %}"
        "{{ message['role'].upper() }}: "
        "{% for item in message['content'] if item['type'] == 'image' %}" + image + "\n{% endfor %}"
        "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }} {% endfor %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
