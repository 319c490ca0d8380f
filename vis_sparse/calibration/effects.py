"""How much an answer depends on visual tokens in each head: derivatives by gates on the heads' outputs.

In the decoder, the attention of a head is its dense output times a gate, plus what it would be without visual tokens
(nothing at visual rows, attention to text alone at text rows) times the rest. In the vision encoder patches have
nothing without it, and class tokens read themselves. The derivative of the answer's log-probability by a gate says how
the answer moves with the visual tokens in that head. It is taken with all gates of the decoder, or of the encoder, half
closed: at 1, the dense model, heads do each other's work, a head whose work others do looks idle, and an answer that
the model is sure of hardly moves at all.

Of the forward pass only the layers' inputs are kept; on the way back each layer runs once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..executor.tower import TowerLayer
from .attention_mass import replaced_attention
from .profiles import Target, arguments_of, column_kinds
from .samples import answer_rows
from .vision import Vision, forwards

_GATE = 0.5


@contextmanager
def recorded_calls(*modules: nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """Within the block, (arguments, keywords) of every call of the modules, in order."""
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
        for module in modules
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def head_effects(target: Target, sample: dict, call: tuple[tuple, dict]) -> torch.Tensor:
    """(layers, heads) float64 on the CPU: squared derivatives of the answer's log-probability by the gates, over their
    sum: every sample counts as much, however sure its answer is.

    call: of the text model in the dense pass over the sample.
    """
    is_visual, is_real = column_kinds(target.layout(sample), sample)
    text = (~is_visual & is_real).nonzero()[:, 0]
    gates = _closed_half(len(target.decoder.layers), target.decoder.num_heads, text.device)

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        dense, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        q, k, v = (tensor.index_select(2, text) for tensor in (query, key, value))
        alone = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        alone = rearrange(alone, "batch head row dim -> batch row head dim")
        without = torch.zeros_like(dense).index_copy(1, text, alone)
        return torch.lerp(without, dense, gates[module.layer_idx].to(dense.dtype)[:, None]), None

    with replaced_attention(target.text_model, attention):
        return _slopes(target, sample, gates, lambda: target.text_model(*call[0], **call[1]))


def tower_effects(target: Target, vision: Vision, sample: dict) -> torch.Tensor:
    """The same of the vision encoder's heads; the decoder is dense."""
    gates = _closed_half(len(vision.tower.layers), vision.tower.num_heads, sample["input_ids"].device)
    is_global = []

    def begin(arguments: dict) -> None:
        is_global[:] = [torch.from_numpy(vision.rows(arguments).y < 0).to(gates.device)]

    with ExitStack() as stack:
        stack.enter_context(vision.calls(begin))
        for index, layer in enumerate(vision.tower.layers):
            stack.enter_context(_gated(layer, gates, index, is_global))
        blocks = [*vision.blocks, *target.text_model.layers]
        return _slopes(target, sample, gates, lambda: target.outer(**arguments_of(sample), use_cache=False), blocks)


@contextmanager
def _gated(layer: TowerLayer, gates: torch.Tensor, index: int, is_global: list[torch.Tensor]) -> Iterator[None]:
    """Within the block, what the heads of an encoder's layer give is mixed with what they give without patches.

    gates (layers, heads); index: of the layer. is_global: one tensor (rows,) bool of the call that runs.
    """
    values, own = [], layer.fused.get("value")

    def value(module, args, output) -> None:
        values[:] = [output if own is None else output[..., own.start : own.stop]]

    def output(module, args):
        gate = gates[index].to(args[0].dtype)[:, None]
        dense = args[0].reshape(-1, len(gate), args[0].shape[-1] // len(gate))
        of_globals = values[0].reshape(dense.shape) * is_global[0][:, None, None]
        return (torch.lerp(of_globals, dense, gate).reshape(args[0].shape),)

    handles = [
        layer.module("value").register_forward_hook(value),
        layer.module("output").register_forward_pre_hook(output),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _closed_half(layers: int, heads: int, device) -> torch.Tensor:
    return torch.full((layers, heads), _GATE, device=device, requires_grad=True)


def _slopes(
    target: Target, sample: dict, gates: torch.Tensor, run: Callable, blocks: Iterable[nn.Module] | None = None
) -> torch.Tensor:
    """(layers, heads) squared derivatives by the gates, over their sum, float64 on the CPU.

    run: the pass over the sample with the gates in it, up to the LM head. blocks: what runs once more on the way back;
    by default the decoder's layers.
    """
    replaced = []
    for block in target.text_model.layers if blocks is None else blocks:
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        replaced.append((block, again))
    with _frozen(target.model), forwards(replaced), torch.enable_grad():
        _log_probability(target, run().last_hidden_state, sample).backward()
    squares = gates.grad.double().square().cpu()
    return squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)


def _log_probability(target: Target, hidden: torch.Tensor, sample: dict) -> torch.Tensor:
    """Of the answer's tokens together, from the final norm's output."""
    rows = answer_rows(sample)
    logits = target.model.get_output_embeddings()(hidden[0, rows]).float()
    return -F.cross_entropy(logits, sample["labels"][0, rows + 1], reduction="sum")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block, no parameter asks for a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
