"""Compare plans on a folder of images: what each answers to one question, and what that costs.

    python examples/compare_on_images.py [FOLDER] [--question "is there a seven?"] [--model CHECKPOINT]

Prints an image a line with the answer under each plan, then how many answers are those of the dense plan, which
computes what the unpatched model does, and the mean share of the decoder's FLOPs. Without FOLDER it draws six images
in out/examples/images; the shipped model knows easy-VQA and 3 x 3 grids of digits only.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vis_sparse
from vis_sparse.calibration.records import read_records
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.eval.tiny.data import questions

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", type=Path)
parser.add_argument("--question", default="is there a seven?")
parser.add_argument("--model", default=checkpoint("llava"))
options = parser.parse_args()
if options.folder is None:
    options.folder = Path("out/examples/images")
    options.folder.mkdir(parents=True, exist_ok=True)
    for number, question in enumerate(questions("exists", 6)):
        question.image.save(options.folder / f"{number}.png")

model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(options.model)
content = [{"type": "image"}, {"type": "text", "text": options.question}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.no_grad()
def ask(image):
    """The answer as the model is patched now, and the share of the dense FLOPs."""
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    model(**inputs)
    seen, end = vis_sparse.inspect(model), inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    return processor.decode(tokens[0, end:], skip_special_tokens=True), seen["flops"] / seen["flops_dense"]


results = {plan: [] for plan in ("dense", "auto", "vtw", "fastv")}
for record in read_records(options.folder, options.question):  # in the order of their names
    image = Image.open(record.image).convert("RGB")
    for plan, asked in results.items():
        with vis_sparse.patched(model, plan):
            asked.append(ask(image))
    print(f"{record.image.name}:", ", ".join(f"{plan} {asked[-1][0]}" for plan, asked in results.items()))
for plan, asked in results.items():
    same = sum(answer == dense for (answer, _), (dense, _) in zip(asked, results["dense"]))
    flops = sum(share for _, share in asked) / len(asked)
    print(f"{plan}: {same} of {len(asked)} answers as dense, {flops:.0%} of the FLOPs")
