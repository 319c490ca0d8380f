"""The classes of lmms-eval that `vis_sparse` patches: small random checkpoints of several families."""

import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

import vis_sparse
from vis_sparse.eval.lmms.model import load
from vis_sparse.patches.errors import PatchError

from ..patches.cases import CASES
from ..patches.processors import IDS, tokenizer

PLAN = "vtw"
SIZES = ((64, 56), (150, 90), (56, 120), (64, 56))
TEMPLATE = (
    "{%% for message in messages %%}{%% if message['content'] is not string %%}"
    "{%% for item in message['content'] %%}{%% if item['type'] == 'image' %%}%s {%% else %%}{{ item['text'] }} "
    "{%% endif %%}{%% endfor %%}{%% endif %%}{%% endfor %%}"
)


def _case(name):
    return next(case for case in CASES if case.name == name)


def _checkpoint(case, folder):
    model = case.build(torch.float32)
    model.lm_head.weight.data[len(IDS) :] = 0  # no words: an answer's text would not tell its tokens
    model.save_pretrained(folder)
    words = tokenizer()
    words.eos_token = "w59"
    processor = case.processor(words)
    processor.chat_template = TEMPLATE % case.image_text
    processor.save_pretrained(folder)
    return str(folder)


def _load(case, folder, **settings):
    small = {"min_pixels": 3136, "max_pixels": 12544} if case.name.startswith("Qwen") else {}
    return load(_checkpoint(case, folder), plan=PLAN, dtype="float32", device="cpu", **small, **settings)


def _documents():
    rng = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (height, width, 3), generator=rng, dtype=torch.uint8) for width, height in SIZES]
    texts = ["w1 w2", "w3 w4 w5 w6 w7", "w8", "w9 w10 w11"]
    return [{"image": Image.fromarray(p.numpy()), "question": text} for p, text in zip(pixels, texts)]


def _requests(model, documents, max_new_tokens):
    settings = {"max_new_tokens": max_new_tokens}

    def messages(document):
        parts = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
        return [{"role": "user", "content": parts}]

    def request(number, document):
        text, where = document["question"], (number, "task", "test")
        arguments = (text, dict(settings), lambda document: [document["image"]], *where)
        if not model.is_simple:
            arguments = (text, messages, dict(settings), *where)
        return Instance("generate_until", arguments, 0, {"task": "task", "doc_id": number, "repeats": 1})

    model.task_dict = {"task": {"test": documents}}
    return [request(number, document) for number, document in enumerate(documents)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_costs_are_those_of_the_call(case, tmp_path):
    model = _load(case, tmp_path)
    for request in _requests(model, _documents(), max_new_tokens=1):
        (answer,) = model.generate_until([request])
        cost, call = answer.token_counts, vis_sparse.inspect(model.model)
        assert (cost.flops, cost.flops_dense) == (call["flops"], call["flops_dense"])
        assert cost.visual_tokens == call["last_call"].layout.num_visual
        assert cost.text_tokens == call["last_call"].text_length
        assert cost.flops < cost.flops_dense and cost.kv_bytes < cost.kv_bytes_dense and cost.seconds > 0


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2.5VL"])
def test_batches_give_each_document_its_answer_and_cost(name, tmp_path):
    case = _case(name)
    given = []
    for size in (1, 2):
        model = _load(case, tmp_path, batch_size=size)
        answers = model.generate_until(_requests(model, _documents(), max_new_tokens=3))
        given.append([(a.text, a.token_counts.flops, a.token_counts.visual_tokens) for a in answers])
    assert given[0] == given[1]
    assert len(set(given[0])) > 2


@pytest.mark.parametrize("name", ["Llava", "Qwen2VL"])  # for chat messages, for plain prompts
def test_a_conversation_on_a_kept_cache_is_one_on_none(name, tmp_path):
    model = _load(_case(name), tmp_path)
    document, asked = _documents()[0], ["w1 w2", "w3 w4 w5", "w6"]

    def ask(_, round_idx=0, previous_output=()):
        images = [] if round_idx else [document["image"]]
        text = "" if round_idx == len(asked) else asked[round_idx]
        if model.is_simple:
            return images, text, round_idx == len(asked), previous_output, None
        parts = [{"type": "image", "url": image} for image in images] + [{"type": "text", "text": text}]
        return [{"role": "user", "content": parts}], round_idx == len(asked), previous_output, None

    settings, where = {"max_new_tokens": 3}, (0, "task", "test")
    arguments = (asked[0], settings, lambda document: [document["image"]], ask, *where)
    if not model.is_simple:
        arguments = (asked[0], ask, settings, *where)
    model.task_dict = {"task": {"test": [document]}}
    request = Instance("generate_until_multi_round", arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})
    (answer,) = model.generate_until_multi_round([request])

    processor, text = model._processor(), _case(name).image_text
    for question, said in zip(asked, answer.text, strict=True):
        assert said == _answer(model, processor, document, f"{text} {question}", 3)
        text = f"{text} {question} {said}"
    _answer(model, processor, document, text.rsplit(" ", 1)[0], 1)  # the last word was never read
    assert answer.token_counts.flops == vis_sparse.inspect(model.model)["flops"]


def _answer(model, processor, document, text, length):
    inputs = processor(images=[document["image"]], text=[text], return_tensors="pt")
    tokens, _ = model.meter.run(**inputs, do_sample=False, max_new_tokens=length)
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_what_no_class_runs_is_refused(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="model_type 'llama', expected one of internvl"):
        load(str(tmp_path))
    with pytest.raises(PatchError, match="base: got 'nonsense'"):
        load(str(tmp_path), base="nonsense")
    with pytest.raises(PatchError, match="pretrained: got none"):
        load()


def test_errors_of_a_plan_are_not_answers(tmp_path):
    """lmms-eval's class for LLaVA takes any error in `generate` for an empty answer."""
    model = _load(_case("Llava"), tmp_path)
    model.model.generation_config.update(output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(PatchError, match="output_attentions"):
        model.generate_until(_requests(model, _documents(), max_new_tokens=2))
