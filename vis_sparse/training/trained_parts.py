"""Which parameters train: the decoder, whole or by adapters, and the projector; never the vision tower."""

from __future__ import annotations

from torch import nn

from ..patches import family_of
from ..patches.errors import PatchError

# What the families call the modules between tower and decoder.
_PROJECTORS = ("multi_modal_projector", "mm_projector", "merger")


def whole_decoder(model: nn.Module, projector: bool) -> nn.Module:
    """Only the decoder, its word embeddings, the LM head and perhaps the projector ask for gradients."""
    model.requires_grad_(False)
    _text_model(model).requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    for name in projectors(model) if projector else ():
        model.get_submodule(name).requires_grad_(True)
    return model


def with_adapters(model: nn.Module, rank: int, projector: bool) -> nn.Module:
    """PEFT's model: LoRA of a rank on the decoder's linear layers, alpha twice the rank, the projector whole."""
    try:
        import peft
    except ImportError:
        raise PatchError("lora: peft is missing, expected pip install 'vis_sparse[train]'") from None
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=_linear_layers(model),
        modules_to_save=projectors(model) if projector else None,
    )
    return peft.get_peft_model(model, config)


def projectors(model: nn.Module) -> list[str]:
    """The names of the modules between tower and decoder."""
    return [name for name, _ in model.named_modules() if name.split(".")[-1] in _PROJECTORS]


def _linear_layers(model: nn.Module) -> list[str]:
    layers = {id(module) for layer in _text_model(model).layers for module in layer.modules()}
    return [name for name, module in model.named_modules() if id(module) in layers and isinstance(module, nn.Linear)]


def _text_model(model: nn.Module) -> nn.Module:
    family = family_of(model)
    return family.text_model(family.outer_model(model))
