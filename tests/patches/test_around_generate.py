"""What transformers puts around `generate`, on a shipped checkpoint: pipelines and streamers."""

from threading import Thread

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline

import vis_sparse
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.eval.tiny.data import questions

from ..marks import slow_but

_SHORT = dict(max_new_tokens=4, do_sample=False)


@pytest.fixture(params=slow_but(["llava"], ["llava", "qwen2_vl", "internvl"]))
def loaded(request):
    folder = checkpoint(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model, AutoProcessor.from_pretrained(folder), folder / "heads.safetensors"


def conversations():
    noise = Image.fromarray(np.random.default_rng().integers(0, 255, (70, 90, 3), dtype=np.uint8))
    asked = [(question.image, question.text) for question in questions("count", 3)] + [(noise, "is there a red shape?")]
    return [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for image, text in asked
    ]


@pytest.mark.parametrize("plan", ["dense", "yopo-12"])
def test_pipelines_and_streamers_give_what_generate_gives(loaded, plan):
    model, processor, calibration = loaded
    asked, tokenizer = conversations(), processor.tokenizer

    def answers():
        made = []
        for conversation in asked:
            inputs = processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            made.append((inputs, model.generate(**inputs, **_SHORT)[0, inputs["input_ids"].shape[1] :]))
        return made

    unpatched = [tokens.tolist() for _, tokens in answers()]
    vis_sparse.patch(model, plan, calibration=calibration)
    patched = answers()
    if plan == "dense":
        assert [tokens.tolist() for _, tokens in patched] == unpatched
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for _, tokens in patched]

    asking = pipeline("image-text-to-text", model=model, processor=processor)
    for batch in (1, 2):
        replies = asking(text=asked, batch_size=batch, generate_kwargs=_SHORT)
        assert [reply[0]["generated_text"][-1]["content"].strip() for reply in replies] == texts

    for (inputs, _), text in zip(patched, texts):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = Thread(target=model.generate, kwargs=dict(inputs, streamer=streamer, **_SHORT))
        thread.start()
        assert "".join(streamer).strip() == text
        thread.join()
