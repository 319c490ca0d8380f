"""The deep model: SmolLM2-135M-Instruct behind a small vision tower; its shape, its prompts and what its training needs
to know."""

from functools import cache

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vis_sparse.eval.tiny import model_llava, smollm2
from vis_sparse.eval.tiny.data import IMAGE_SIZE

NAME, TITLE = "smol", "LLaVA with SmolLM2"
MODEL = LlavaForConditionalGeneration
WIDTH = 576
SIZES = ()  # images as they are drawn
PATCH, GRID = model_llava.PATCH, model_llava.GRID
places = model_llava.places
VISUAL_TOKENS = GRID * GRID
IMAGE, IMAGE_TOKEN = 4, "<reponame>"  # a token that chats have no use for
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""SmolLM2's own system message, which its chat template puts first."""


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}" + IMAGE_TOKEN + "{{ '\n' }}{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's, for messages that hold images too."""


def config() -> LlavaConfig:
    """96x96 images as 144 visual tokens; CLIP 8 layers x 128, SmolLM2-135M: 136 M parameters."""
    return LlavaConfig(
        vision_config=vision_config(), text_config=smollm2.config(), image_token_index=IMAGE,
        image_seq_length=VISUAL_TOKENS, vision_feature_layer=-1, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", tie_word_embeddings=True, pad_token_id=smollm2.EOS,
    )  # fmt: skip


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=IMAGE_SIZE, patch_size=PATCH, hidden_size=128, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=4, projection_dim=128, hidden_act="quick_gelu",
    )  # fmt: skip


def processor() -> LlavaProcessor:
    """CLIP's image preparation at 96x96, SmolLM2's tokenizer, padding on the left, and the chat template."""
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    tokenizer = smollm2.tokenizer()
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the latter is what is saved
    tokenizer.image_token = IMAGE_TOKEN
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=IMAGE_TOKEN, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


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
