"""A loaded vLLM model, made to run plans: its forward, its layers' attention metadata, weights that visual rows need.

Runs in each worker, once, between loading the weights and packing them. Names of vLLM's modules stand here, in
`engine.py` and in `kv_blocks.py`, nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.mistral import MistralAttention, MistralMLP
from vllm.model_executor.models.qwen2 import Qwen2Attention, Qwen2MLP
from vllm.platforms import current_platform

from .cuts import CutLinear, Shards
from .errors import ServingError
from .groups import has_two_tables
from .kv_blocks import spec_of
from .lanes import planned_forward
from .runtime import Runtime
from .settings import Loaded, TextShape

logger = init_logger("vllm.vis_sparse")

ATTENTION = (LlamaAttention, Qwen2Attention, MistralAttention)
FFN = (LlamaMLP, Qwen2MLP, MistralMLP)
RUN_BACKENDS = ("CPU_ATTN",)
READ_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")  # written for, never run here
RUNTIME = "vis_sparse_runtime"


def install(model: nn.Module, vllm_config: VllmConfig, loaded: Loaded, shape: TextShape) -> None:
    """Make `model` run the loaded plans. Raises ServingError for a model or backend that cannot."""
    layers = _checked_layers(model, shape)
    runtime = Runtime(loaded, shape)
    shards = Shards(
        get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), tensor_model_parallel_all_reduce
    )
    with torch.device(layers[0].self_attn.qkv_proj.weight.device):
        forward = planned_forward(model, runtime, shards, _packer(), get_forward_context)
    model.forward = forward
    setattr(model, RUNTIME, runtime)
    model.vis_sparse_forward = forward
    model.load_weights = _no_reload
    if has_two_tables(runtime.layers, vllm_config):
        for index, layer in enumerate(layers):
            _give_spec(layer.self_attn.attn, runtime, index)
    model.get_model_state_cls = lambda: _state_class(runtime)  # what Model Runner V2 asks for
    parts = nn.ModuleList([*forward.keys.values(), *forward.ffns.values()])
    extra = sum(part.bytes for part in parts.modules() if isinstance(part, CutLinear))
    logger.info(
        "vis_sparse: plans %s (default %s), %d layers changed, at most %.1f MiB of weights twice",
        ", ".join(loaded.names),
        loaded.names[0],
        sum(not kinds.is_dense for kinds in runtime.layers),
        extra / 2**20,
    )


def _give_spec(attention: nn.Module, runtime: Runtime, index: int) -> None:
    own = attention.get_kv_cache_spec
    attention.get_kv_cache_spec = lambda vllm_config: spec_of(runtime.layers, index, own(vllm_config))


def _no_reload(*args, **kwargs):
    raise ServingError(
        "got new weights for a model under a plan, expected an engine made anew (visual rows use parts that were cut "
        "from the weights when they were loaded)"
    )


def _checked_layers(model: nn.Module, shape: TextShape) -> list[nn.Module]:
    name = type(model).__name__
    try:
        layers = list(model.language_model.model.layers)
    except AttributeError:
        raise ServingError(
            f"{name}: got no language_model.model.layers, expected a LLaVA, Qwen2-VL, Qwen2.5-VL or InternVL"
        ) from None
    if len(layers) != shape.layers:
        raise ServingError(f"{name}: got {len(layers)} layers, expected the config's {shape.layers}")
    for index, layer in enumerate(layers):
        where = f"{name}, layer {index}"
        if type(getattr(layer, "self_attn", None)) not in ATTENTION or type(getattr(layer, "mlp", None)) not in FFN:
            raise ServingError(f"{where}: got {type(layer).__name__}, expected a layer of Llama, Mistral or Qwen2")
        attention = layer.self_attn
        if getattr(attention, "qk_norm", False) or getattr(attention, "do_llama_4_scaling", False):
            raise ServingError(f"{where}: got query or key normalisation, expected none")
        if getattr(attention, "dual_chunk_attention_config", None):
            raise ServingError(f"{where}: got dual chunk attention, expected causal attention")
        for part in (attention.qkv_proj, attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            if not isinstance(part.quant_method, UnquantizedLinearMethod):
                raise ServingError(
                    f"{where}: got weights quantised by {type(part.quant_method).__name__}, expected plain ones "
                    "(parts of them are needed for visual rows)"
                )
        impl = attention.attn.impl
        if getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1)):
            raise ServingError(f"{where}: got sliding-window attention, expected attention to all earlier tokens")
        backend = attention.attn.attn_backend
        if backend.get_name() not in RUN_BACKENDS + READ_BACKENDS or backend.forward_includes_kv_cache_update:
            raise ServingError(
                f"{where}: got the attention backend {backend.get_name()}, expected one of "
                f"{', '.join(RUN_BACKENDS + READ_BACKENDS)} (--attention-backend)"
            )
    if layers[0].self_attn.attn.attn_backend.get_name() in READ_BACKENDS:
        logger.warning("vis_sparse: this attention backend was written for, and has not been run by the project")
    return layers


def _packer() -> Callable | None:
    if not current_platform.is_cpu():
        return None
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    return lambda layer: dispatch_cpu_unquantized_gemm(layer, remove_weight=True)


def _state_class(runtime: Runtime) -> type:
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from .model_state import planned_state

    return planned_state(DefaultModelState, runtime)
