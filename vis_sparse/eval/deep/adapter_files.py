"""An adapter of the deep model: what it trains of the projector, and its files, in peft's format."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vis_sparse.eval.deep.decoder import LINEARS, SCALE, Decoder, place_of
from vis_sparse.eval.tiny.smol_files import ADAPTED_MODEL, ADAPTER, ADAPTER_CONFIG, LORA, SIDES, merged
from vis_sparse.patches.saving import save_block
from vis_sparse.plans.carried import to_block
from vis_sparse.plans.plan import VisualPlan

LAYERS, PROJECTOR = "language_model.layers.", "multi_modal_projector."
PROJECTOR_LINEARS, PROJECTOR_RANK = ("linear_1", "linear_2"), 24


class Added(nn.Module):
    """A frozen weight (out, in) plus a low-rank difference, which is nothing at first."""

    def __init__(self, out: int, inside: int):
        super().__init__()
        self.a = nn.Parameter(torch.randn(PROJECTOR_RANK, inside) / math.sqrt(inside))
        self.b = nn.Parameter(torch.zeros(out, PROJECTOR_RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SCALE * self.b @ self.a


def with_difference(projector: nn.ModuleDict) -> dict[str, nn.Parameter]:
    """Freeze a projector's weights, and add differences to them: these by `<linear>-a` and `-b`."""
    projector.requires_grad_(False)
    parameters = {}
    for name in PROJECTOR_LINEARS:
        added = Added(*projector[name].weight.shape)
        parametrize.register_parametrization(projector[name], "weight", added)
        parameters |= {f"{name}-a": added.a, f"{name}-b": added.b}
    return parameters


@torch.no_grad()
def merge(projector: nn.ModuleDict, added: dict[str, Tensor]) -> None:
    """Put an adapter's difference (`adapter_difference`) into a projector's weights."""
    for name in PROJECTOR_LINEARS:
        weight = projector[name].weight
        weight.copy_(merged(f"{PROJECTOR}{name}.weight", weight, added))


def write(
    folder: Path, decoder: Decoder, projector: dict[str, nn.Parameter], plan: VisualPlan, fitted: dict[str, Tensor]
) -> None:
    """Config and fp16 tensors of a decoder's `lora` and of `with_difference`, and their resolved plan.

    fitted: what the training began with (`adapter_difference`), which goes into the same maps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, ranks = {}, dict.fromkeys(PROJECTOR_LINEARS, PROJECTOR_RANK)
    for key, tensor in decoder.lora.items():
        layer, name, side = key.split("-")
        module = f"{layer}.{place_of(name)}"
        before = fitted.get(f"{LORA}model.layers.{module}.{side}")
        if before is not None:
            tensor = torch.cat([before, tensor]) if side == "a" else torch.cat([before / SCALE, tensor], dim=1)
            ranks[f"layers.{module}"] = tensor.shape[side == "b"]
        tensors[f"{ADAPTED_MODEL}{LAYERS}{module}{SIDES[f'.{side}']}"] = tensor
    for key, tensor in projector.items():
        name, side = key.split("-")
        tensors[f"{ADAPTED_MODEL}{PROJECTOR}{name}{SIDES[f'.{side}']}"] = tensor
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    (folder / ADAPTER).chmod(0o644)  # safetensors lets nobody else read its files
    config = {
        "peft_type": "LORA", "r": decoder.rank, "lora_alpha": int(SCALE * decoder.rank), "lora_dropout": 0.0,
        "bias": "none", "inference_mode": True, "fan_in_fan_out": False, "base_model_name_or_path": "tiny/smol",
        "target_modules": r".*(language_model\.layers\.\d+\.(self_attn|mlp)|multi_modal_projector)"
        rf"\.({'|'.join((*LINEARS, *PROJECTOR_LINEARS))})",
        "rank_pattern": ranks, "alpha_pattern": {name: int(SCALE * rank) for name, rank in ranks.items()},
    }  # fmt: skip
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    sizes = decoder.config.num_attention_heads, decoder.config.intermediate_size
    save_block(to_block({plan.name: plan}, *sizes), folder)
