"""What the check of `patch` costs, in decode steps of the model: `python -m tests.check_cost`.

Process time, one thread, fp32, a LLaVA of 32 layers at widths 256 and 4096; rounds of both in turns, ratios of medians.
The layers share the weights of one (at width 4096 0.8 GB, more than any cache holds), so that a machine of little
memory can tell.
"""

import statistics
import sys
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import vis_sparse
from vis_sparse.patches import verify

LAYERS, ROUNDS, PROMPT = 32, 7, 64
FFN = {256: 688, 4096: 11008}


def model_of(width: int) -> LlavaForConditionalGeneration:
    """LLaMA's shape: heads of 128 (32 at width 256), a small vocabulary."""
    heads = width // (128 if width >= 1024 else 32)
    sizes = dict(hidden_size=width, intermediate_size=FFN[width], num_attention_heads=heads, vocab_size=512)
    text = LlamaConfig(**sizes, num_hidden_layers=1)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
    decoder = model.model.language_model
    for index in range(1, LAYERS):
        with torch.device("meta"):
            layer = LlamaDecoderLayer(decoder.config, index).eval()
        for shared, own in zip(decoder.layers[0].modules(), layer.modules(), strict=True):
            own._parameters.update(shared._parameters)
        decoder.layers.append(layer)
    decoder.config.num_hidden_layers = LAYERS
    return model


def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def ratios(width: int) -> tuple[float, float]:
    """Medians of a decode step and of what the check adds to `patch`, in seconds."""
    model = model_of(width)
    decoder = model.model.language_model
    rows = torch.randn(1, PROMPT, width)
    cache = decoder(inputs_embeds=rows, use_cache=True).past_key_values

    def step():
        decoder(inputs_embeds=rows[:, :1], past_key_values=cache, use_cache=True)

    def patch(checked: bool):
        verify._known.clear()
        vis_sparse.patch(model, "dense", verify=checked)
        vis_sparse.unpatch(model)

    steps, checks = [], []
    for index in range(ROUNDS + 1):
        taken = seconds(step), seconds(lambda: patch(True)), seconds(lambda: patch(False))
        if index:  # the first one warms up
            steps.append(taken[0])
            checks.append(taken[1] - taken[2])
    return statistics.median(steps), statistics.median(checks)


def main() -> None:
    torch.set_num_threads(1)
    for width in map(int, sys.argv[1:] or FFN):
        step, check = ratios(width)
        print(f"width {width}: decode step {step * 1e3:.1f} ms, check {check * 1e3:.1f} ms: {check / step:.2f} steps")


if __name__ == "__main__":
    main()
