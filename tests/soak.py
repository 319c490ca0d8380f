"""Many calls by several threads on one patched model, against what each call gives alone: `python -m tests.soak`.

Trained small models of two families, every shipped plan, real images and prompts without one; every call is a prompt,
some go on with decode steps. Prints a line a plan; exits with 1 at the first wrong call.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
import time

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vis_sparse
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.eval.tiny.data import questions
from vis_sparse.eval.tiny.families import FAMILIES

FAMILY_NAMES = ("llava", "qwen2_vl")
STEPS = 2  # of decoding after a prompt
TOLERANCE = 1e-3  # of logits; what is another call's differs by 1 and more


class Request:
    """One prompt as a processor makes it, and the tokens that follow.

    Its positions are all given: transformers keeps what M-RoPE needs for decoding on the model, where threads share it.
    """

    def __init__(self, inputs: dict, model):
        self.inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.length = self.inputs["input_ids"].shape[1]
        self.tokens = torch.arange(3, 3 + STEPS)[None]
        self.mask = torch.ones(1, self.length + STEPS, dtype=torch.long)
        self.positions = torch.arange(self.length)[None]
        if hasattr(model.model, "get_rope_index"):
            self.positions = self.positions.expand(3, 1, -1)
            if "pixel_values" in self.inputs:
                self.positions = model.model.get_rope_index(**self.inputs)[0]

    @torch.no_grad()
    def run(self, model, steps: int) -> torch.Tensor:
        """Logits of the last row of the prompt and of every decode step."""
        out = model(**self.inputs, position_ids=self.positions, use_cache=True)
        logits, last = [out.logits[:, -1]], self.positions.amax(-1, keepdim=True).amax(0, keepdim=True)
        for step in range(steps):
            out = model(
                input_ids=self.tokens[:, step : step + 1],
                attention_mask=self.mask[:, : self.length + step + 1],
                position_ids=(last + step + 1).expand(*self.positions.shape[:-1], 1),
                past_key_values=out.past_key_values,
            )
            logits.append(out.logits[:, -1])
        return torch.cat(logits)


def requests(family: str, processor, model) -> list[Request]:
    """Questions about images of every size, several at once in some prompts, and text alone."""
    asked = [q for kind in ("easy_vqa", "place", "count") for q in questions(kind, 4, sizes=FAMILIES[family].SIZES)]
    prompts = [[question] for question in asked] + [asked[:2], asked[3:5]]
    found = []
    for several in prompts:
        content = [{"type": "image"} for _ in several] + [{"type": "text", "text": several[0].text}]
        found.append((content, [question.image for question in several]))
    found.append(([{"type": "text", "text": asked[0].text}], None))
    chats = ([{"role": "user", "content": content}] for content, _ in found)
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    encoded = (processor(images=images, text=[text], return_tensors="pt") for text, (_, images) in zip(texts, found))
    return [Request(inputs, model) for inputs in encoded]


def soak(model, asked: list[Request], calls: int, threads: int) -> list[str]:
    """What was wrong in `calls` calls of several threads; [] if nothing was."""
    alone = [request.run(model, STEPS) for request in asked]
    wrong: list[str] = []
    numbers = itertools.count()

    def serve():
        while not wrong and (number := next(numbers)) < calls:
            index, steps = number * 7 % len(asked), STEPS * (number % 3 == 0)
            try:
                off = float((asked[index].run(model, steps) - alone[index][: steps + 1]).abs().max())
                if not off <= TOLERANCE:
                    wrong.append(f"call {number}, request {index}: off by {off:.3g}")
            except Exception as error:
                wrong.append(f"call {number}, request {index}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=serve) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000, help="in all")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--plans", default=",".join(["dense", *plans_of_the_decoder()]))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plans = list(dict.fromkeys(given.plans.split(",")))
    each = -(-given.calls // (len(plans) * len(FAMILY_NAMES)))
    for family in FAMILY_NAMES:
        folder = checkpoint(family)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        asked = requests(family, AutoProcessor.from_pretrained(folder), model)
        for plan in plans:
            vis_sparse.patch(model, plan, calibration=folder / "heads.safetensors")
            start = time.monotonic()
            wrong = soak(model, asked, each, given.threads)
            print(f"{family}, {plan}: {each} calls, {time.monotonic() - start:.0f} s", *wrong, flush=True)
            if wrong:
                return 1
    return 0


def plans_of_the_decoder() -> list[str]:
    """The others need scores of the vision encoder, which the shipped files do not have."""
    return [name for name in vis_sparse.plan_names() if vis_sparse.load_plan(name).tower is None]


if __name__ == "__main__":
    sys.exit(main())
