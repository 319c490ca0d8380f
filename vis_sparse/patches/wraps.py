"""Wraps that work through calls of a whole model or decoder layer, which lanes never make: refused by name.

Linear layers and norms are called, so what wraps those (adapters, quantised layers, offload hooks, parametrisations) is
obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..executor.bound import Bound
from .errors import PatchError

_INSTEAD = "patch the model, then wrap it whole (fully_shard(model), FullyShardedDataParallel, DistributedDataParallel)"


def blocks(text_model: nn.Module) -> list[tuple[nn.Module, nn.Module, nn.Module, float]]:
    """The modules of each decoder layer that parts are looked up in, and the scale of its attention scores."""
    found = []
    for layer in text_model.layers:
        inside = layer._modules  # asked once a call: attributes of modules are slow
        attention = inside.get("self_attn") or layer.self_attn
        found.append((layer, attention, inside.get("mlp") or layer.mlp, vars(attention).get("scaling")))
    return found


def check_structure(text_model: nn.Module, before: list[tuple]) -> None:
    """Raise PatchError if decoder layers are not those that were patched, `before`."""
    for index, (now, then) in enumerate(zip(blocks(text_model), before)):
        if now != then:
            check_layers(text_model.layers)  # what wraps a layer is named, rather than called another layer
            raise PatchError(
                f"layers: got another layer {index} than at vis_sparse.patch, expected the same decoder (patch the "
                "model again after changing its structure)"
            )
    for number in (len(text_model.layers), text_model.config.num_hidden_layers):
        if number != len(before):
            raise PatchError(
                f"layers: got {number}, expected the {len(before)} there were at "
                "vis_sparse.patch (patch the model again after changing its structure)"
            )


def check_no_wrapper(model: nn.Module) -> None:
    """Raise PatchError for a module that holds the model that is meant."""
    if any(isinstance(model._modules.get(name), nn.Module) for name in ("module", "_fsdp_wrapped_module", "_orig_mod")):
        raise PatchError(
            f"model: got a {type(model).__name__}, expected the model inside it: vis_sparse.patch comes first, then "
            "the wrapper"
        )


def check_devices(device_map: Mapping[str, object] | None) -> None:
    """Raise PatchError if a `device_map` computes on several devices. What lies on the CPU or disk is loaded to one."""
    computing = set((device_map or {}).values()) - {"cpu", "disk"}
    if len(computing) > 1:
        raise PatchError(
            f"model: got a device map over {len(computing)} devices, expected one that computes on one device (the "
            "rest may lie on the CPU or disk)"
        )


def check_wraps(layers: nn.ModuleList, before: list[tuple], bound: Bound) -> None:
    """`check_layers`, where what it depends on has changed since it was asked: the modules that are bound, and classes
    and hooks of `blocks`."""
    owners = [owner for layer, attention, ffn, _ in before for owner in (layer, attention, ffn)]
    wraps = [*map(type, owners), *(vars(owner).get("_hf_hook") for owner in owners)]
    if wraps != bound.checked:
        check_layers(layers)
        bound.checked = wraps


def check_layers(layers: nn.ModuleList) -> None:
    """Raise PatchError where the parameters of a decoder layer are there only while the layer itself is called, or only
    in part."""
    for index, layer in enumerate(layers):
        kinds = {cls.__name__ for cls in type(layer).__mro__}
        for kind, name in (("FSDPModule", "fully_shard"), ("FullyShardedDataParallel",) * 2):
            if kind in kinds:
                raise PatchError(
                    f"layers: got {name} on decoder layer {index}, which gathers its parameters when it is called; "
                    f"lanes call its linear layers and norms alone. Expected: {_INSTEAD}"
                )
        for owner in (layer, layer.self_attn, layer.mlp):
            for name, module in owner._modules.items():
                check_parameters(f"{name} of decoder layer {index}", owner, module)


def check_parameters(place: str, owner: nn.Module, module: nn.Module) -> None:
    """Raise PatchError where the parameters of a module in `owner` are parts, or there only while `owner` is called."""
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if hasattr(parameter, "placements"):
            raise PatchError(
                f"layers: got {place} as a DTensor (tensor parallel, or fully_shard before vis_sparse.patch), expected "
                f"whole ones: {_INSTEAD}"
            )
        if parameter.is_meta and hasattr(owner, "_hf_hook") and not hasattr(module, "_hf_hook"):
            raise PatchError(
                f"layers: got {place} under an offload hook of the {type(owner).__name__} around it, expected hooks on "
                "the linear layers and norms (offload without preload_module_classes)"
            )


def check_text_model(outer: nn.Module, now: nn.Module, before: nn.Module) -> None:
    """Raise PatchError if another text model stands in `outer` than the patched one, `before`; it may be wrapped."""
    if now is not before and all(module is not before for module in now.modules()):
        raise PatchError(
            f"{type(outer).__name__}: got another text model than at vis_sparse.patch, expected the same one "
            "(patch the model again after changing its structure)"
        )


def refuse_replicas(state, plain):
    """What `DataParallel` finds where it replicates a module."""
    raise PatchError(
        "DataParallel: got a patched model to replicate over threads, expected DistributedDataParallel, or a model "
        "patched in each process"
    )
