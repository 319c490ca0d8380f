"""A conversation with several images on one KV cache.

    python examples/conversation.py [llava | qwen2_vl | internvl]

Five turns; four bring an image, one asks about the image before it. The cache is kept, so each turn computes its own
tokens only. Prints the answers under each plan, and the KV cache at the end in percent of the dense one: visual keys
are kept only where text reads them, while the sequence keeps its length and every token its position. (The shipped
models were trained on single questions: unpatched, too, they get a later turn wrong here and there.)
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import vis_sparse
from vis_sparse.eval.tiny import NAMES, checkpoint
from vis_sparse.eval.tiny.data import questions
from vis_sparse.eval.tiny.families import FAMILIES

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("family", nargs="?", choices=NAMES, default="llava")
family = parser.parse_args().family

folder, size = checkpoint(family), FAMILIES[family].SIZES[-1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder)
turns = [(q.image, q.text) for kind in ("place", "easy_vqa") for q in questions(kind, 2, sizes=size)]
turns.insert(1, (None, "is there a seven?"))
print("questions:", *(text if image else f"{text} (same image)" for image, text in turns), sep="\n  ")


def converse():
    """The answers, and all token ids, (1, length)."""
    cache, ids, answers = DynamicCache(config=model.config.get_text_config()), torch.zeros(1, 0, dtype=torch.long), []
    for image, text in turns:
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        first = not answers  # the start token stands before the first turn only
        new = processor(images=image and [image], text=[prompt], return_tensors="pt", add_special_tokens=first)
        prompt_ids = torch.cat([ids, new["input_ids"]], dim=1)
        pixels = {name: new[name] for name in ("pixel_values", "image_grid_thw") if name in new}
        mask = torch.ones_like(prompt_ids)
        ids = model.generate(prompt_ids, attention_mask=mask, past_key_values=cache, do_sample=False, **pixels)
        answers.append(processor.decode(ids[0, prompt_ids.shape[1] :], skip_special_tokens=True))
    return answers, ids


for plan in (None, "dense", "auto", "yopo-25"):
    vis_sparse.unpatch(model)
    if plan is not None:
        vis_sparse.patch(model, plan, calibration=folder / "heads.safetensors")
    answers, ids = converse()
    prompt = {"images": 4, "image_size": size[0] if size else None}
    prompt["text_tokens"] = int((ids != model.config.image_token_id).sum())
    kv, kv_dense = (vis_sparse.flops(model, name, **prompt).kv_bytes for name in (plan or "dense", "dense"))
    print(f"{plan or 'unpatched'} ({ids.shape[1]} tokens, KV cache {kv / kv_dense:.0%}):", ", ".join(answers))
