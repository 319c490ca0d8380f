"""What people put around models: the cases of `wraps.py`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import accelerate
import peft
import pytest
import torch
from packaging.version import Version
from torch import distributed, nn
from torch.nn.utils import parametrizations, prune
from transformers.integrations.peft import MIN_PEFT_VERSION

from ..models import LAYERS, make_model

RANKS = 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = rf".*language_model.*\.({'|'.join(PROJECTIONS)})"


def small_model():
    """Wide enough for kernels that want multiples of 64."""
    return make_model("llama-gqa", dtype=torch.float32, hidden_size=128, intermediate_size=128)


def linears(model) -> list[tuple[nn.Module, str]]:
    """(owner, name) of the decoder's linear layers."""
    layers = model.model.language_model.layers
    owners = [owner for layer in layers for owner in (layer.self_attn, layer.mlp)]
    return [(owner, name) for owner in owners for name in PROJECTIONS if hasattr(owner, name)]


class BuffersOnly(nn.Module):
    """A linear layer of 8-bit integers and scales in buffers, without parameters: the kind that GPTQ and AWQ make."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales)


# Wraps: of a model, in place or not; they return what is called.


def lora(model, **settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


def lora_merged(model):
    return lora(model).merge_and_unload()


def lora_disabled(model):
    adapted = lora(model)
    adapted.base_model.disable_adapter_layers()
    return adapted


def added_adapter(model):
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # some releases want one that is not out yet
        pytest.skip(f"this transformers wants peft {MIN_PEFT_VERSION} for add_adapter, patched or not")
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=False))
    return model


def buffers_only(model):
    for owner, name in linears(model):
        setattr(owner, name, BuffersOnly(getattr(owner, name)))
    return model


def bitsandbytes_4_bit(model):
    from bitsandbytes.nn import Linear4bit

    for owner, name in linears(model):
        plain = getattr(owner, name)
        quantised = Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32)
        quantised.load_state_dict(plain.state_dict())
        setattr(owner, name, quantised.to("cpu"))
    return model


def torchao_weights(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.language_model.layers, Int8WeightOnlyConfig())
    return model


def torchao_activations(model):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model.model.language_model.layers, Int8DynamicActivationInt8WeightConfig())
    return model


def weight_norm(model):
    for owner, name in linears(model):
        parametrizations.weight_norm(getattr(owner, name))
    return model


def pruned(model):
    for owner, name in linears(model):
        prune.l1_unstructured(getattr(owner, name), "weight", amount=0.3)
    return model


def hooked(model):
    for owner, name in linears(model):
        getattr(owner, name).register_forward_hook(lambda module, args, output: 0.5 * output)
    return model


def trains_values(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "v_proj" in name and "language_model" in name
    return model


def checkpointed(model, use_reentrant: bool):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=use_reentrant))
    return model


def checkpointed_inputs(model, use_reentrant: bool):
    model.enable_input_require_grads()
    return checkpointed(model, use_reentrant)


def cpu_offload(model, **settings):
    return accelerate.cpu_offload(model, execution_device="cpu", **settings)


def disk_offload(model):
    return accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device="cpu")


def dispatched(model, layers: str = "cpu"):
    """A `device_map`, the first decoder layer's entry apart."""
    parts = dict.fromkeys(("lm_head", "model.vision_tower", "model.multi_modal_projector"), "cpu")
    text = "model.language_model"
    parts |= dict.fromkeys((f"{text}.embed_tokens", f"{text}.norm", f"{text}.rotary_emb"), "cpu")
    parts |= {f"{text}.layers.{index}": layers if index == 0 else "cpu" for index in range(LAYERS)}
    return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True)


def two_devices(model):
    """The map alone: there is one device here."""
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1, "lm_head": 1}
    return model


def mesh():
    return distributed.device_mesh.init_device_mesh("cpu", (RANKS,))


def fsdp1(model, by_layer: bool = False):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.model.language_model.layers[0])}) if by_layer else None
    return FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        auto_wrap_policy=policy,
        use_orig_params=True,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
    )


def fsdp2(model, by_layer: bool = False):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.language_model.layers if by_layer else ():
        fully_shard(layer, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def ddp(model):
    model.model.vision_tower.requires_grad_(False)  # its last layer gets no gradient, which the wrapper refuses
    return nn.parallel.DistributedDataParallel(model)


def tensor_parallel(model):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    whole = mesh()
    for layer in model.model.language_model.layers:
        plan = {f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        plan |= {f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        parallelize_module(
            layer, whole, plan | {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        )
    return model


@dataclass(frozen=True)
class Wrap:
    """wrap(model): what is called then. changes: whether it computes something else than the model it is put around.

    ranks: processes that it needs. exact: whether a layer gives a row the same, whatever rows are beside it.
    """

    name: str
    wrap: Callable
    changes: bool = False
    ranks: int = 1
    exact: bool = True


def _with(function, **settings):
    return functools.partial(function, **settings)


WRAPS = (
    Wrap("PEFT LoRA", lora, changes=True),
    Wrap("PEFT DoRA", _with(lora, use_dora=True), changes=True),
    Wrap("PEFT, adapters disabled", lora_disabled),
    Wrap("PEFT, merged and unloaded", lora_merged, changes=True),
    Wrap("`model.add_adapter`", added_adapter, changes=True),
    Wrap("quantised, buffers only (GPTQ, AWQ)", buffers_only, changes=True),
    Wrap("bitsandbytes, 4 bits", bitsandbytes_4_bit, changes=True),
    Wrap("torchao, 8-bit weights", torchao_weights, changes=True),
    Wrap("torchao, 8-bit weights and activations", torchao_activations, changes=True, exact=False),
    Wrap("torch `weight_norm`", weight_norm),
    Wrap("torch `prune`", pruned, changes=True),
    Wrap("forward hooks on projections", hooked, changes=True),
    Wrap("only `v_proj` trains", trains_values),
    Wrap("gradient checkpointing", _with(checkpointed, use_reentrant=False)),
    Wrap("gradient checkpointing, input gradients", _with(checkpointed_inputs, use_reentrant=False)),
    Wrap("gradient checkpointing, reentrant, input gradients", _with(checkpointed_inputs, use_reentrant=True)),
    Wrap("accelerate, offload to the CPU", cpu_offload),
    Wrap(
        "accelerate, offload of whole decoder layers", _with(cpu_offload, preload_module_classes=["LlamaDecoderLayer"])
    ),
    Wrap("accelerate, offload to disk", disk_offload),
    Wrap("accelerate, `device_map` of one device", dispatched),
    Wrap("accelerate, `device_map` of one device and disk", _with(dispatched, layers="disk")),
    Wrap("`device_map` of two devices", two_devices),
    Wrap("DataParallel (on the CPU)", nn.DataParallel),
    Wrap("DistributedDataParallel", ddp, ranks=RANKS),
    Wrap("FSDP1, the whole model", fsdp1, ranks=RANKS),
    Wrap("FSDP1, layer by layer", _with(fsdp1, by_layer=True), ranks=RANKS),
    Wrap("FSDP2, the whole model", fsdp2, ranks=RANKS),
    Wrap("FSDP2, layer by layer", _with(fsdp2, by_layer=True), ranks=RANKS),
    Wrap("tensor parallel", tensor_parallel, ranks=RANKS),
)
