"""Patch a model, generate under several plans, and put it back as it was.

    python examples/patch_and_generate.py [llava | qwen2_vl | internvl]

Four held-out questions to a shipped model of 3 M parameters, in one padded batch. Prints for the unpatched model and
each plan the share of the decoder's FLOPs and the four answers, and at the end whether the model, unpatched, gives its
first tokens again. For a model of yours: its folder or name in `from_pretrained`, your images and prompts in `inputs`.
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vis_sparse
from vis_sparse.eval.tiny import NAMES, checkpoint
from vis_sparse.eval.tiny.data import KINDS, framed, questions
from vis_sparse.eval.tiny.families import FAMILIES

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("family", nargs="?", choices=NAMES, default="llava")
family = parser.parse_args().family

folder = checkpoint(family)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder)

asked = framed([questions(kind, 1)[0] for kind in KINDS], FAMILIES[family].SIZES)
chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}] for q in asked]
prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
inputs = processor(images=[q.image for q in asked], text=prompts, padding=True, return_tensors="pt")


def generate():
    tokens = model.generate(**inputs, do_sample=False)
    return tokens, processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print("questions:", *(question.text for question in asked), sep="\n  ")
print("right:", ", ".join(question.answer for question in asked))
first, answers = generate()
print("unpatched:", ", ".join(answers))
for plan in ("dense", "auto", "yopo-25"):
    # the file says which heads yopo-25 keeps; dense and auto need none
    vis_sparse.patch(model, plan, calibration=folder / "heads.safetensors")
    _, answers = generate()
    counted = vis_sparse.inspect(model)  # of the last prompt
    print(f"{plan} ({counted['flops'] / counted['flops_dense']:.0%} of the FLOPs):", ", ".join(answers))

vis_sparse.unpatch(model)
print("unpatched again, same tokens:", torch.equal(generate()[0], first))
