"""A new method as a plan: written in Python and as YAML, its FLOPs and answers beside dense.

    python examples/new_method.py

The method, a funnel: visual tokens are computed in full in the first quarter of the layers, look at their neighbours
with half of the FFN in the second, stand still but are read in the third, and are gone in the last. Five fields of a
layer say that; there is nothing else to write. Prints whether both forms are one plan, and for dense, the funnel and a
published plan the share of the visual tokens' FLOPs, of the KV cache, and of right answers to 48 held-out questions.
"""

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vis_sparse
from vis_sparse import LayerPlan, Neighborhood, VisualPlan
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.eval.tiny.data import KINDS, questions
from vis_sparse.eval.tiny.score import score

YAML = """
name: funnel
about: An example
layers:
  25%-: {attention: {radius: 2}, ffn: 0.5}
  50%-: {attention: none, ffn: 0}
  75%-: off
"""


def funnel(num_layers: int) -> VisualPlan:
    stages = (
        LayerPlan(),
        LayerPlan(attention=Neighborhood(radius=2), ffn=0.5),
        LayerPlan(attention="none", ffn=0),
        LayerPlan.off(),
    )
    layers = [stages[4 * layer // num_layers] for layer in range(num_layers)]
    return VisualPlan(layers, name="funnel", about="An example")


model = AutoModelForImageTextToText.from_pretrained(checkpoint("llava"), dtype=torch.float32)
processor = AutoProcessor.from_pretrained(checkpoint("llava"))
plan = funnel(model.config.text_config.num_hidden_layers)
print("YAML and Python are one plan:", plan == VisualPlan.from_yaml(YAML, num_layers=plan.num_layers))

asked = [question for kind in KINDS for question in questions(kind, 12)]
dense = vis_sparse.flops(model, "dense")
for candidate in ("dense", plan, "vtw"):
    cost = vis_sparse.flops(model, candidate)
    with vis_sparse.patched(model, candidate):
        right = score(model, processor, asked)
    flops, kv = cost.prefill.lane("visual") / dense.prefill.lane("visual"), cost.kv_bytes / dense.kv_bytes
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in right.items())
    print(f"{cost.plan}: FLOPs {flops:.0%}, KV cache {kv:.0%}; right: {shares}")
