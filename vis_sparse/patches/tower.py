"""Vision encoders under the tower section of a plan: what a kind of encoder tells, and how it is read and checked.

A kind is one short entry in a family's file: where the parts of a layer are, and where the rows of a call lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

from ..executor.tower import Tower, TowerExecutor, TowerLayer, TowerRun
from ..executor.tower_tables import TowerRows, TowerTables
from ..executor.weights import listens
from ..kernels import Backend
from ..plans.plan import VisualPlan
from .errors import PatchError
from .wraps import check_parameters

# settings of configs that drop parts of what is computed while a model trains
_DROPOUTS = ("attention_dropout", "hidden_dropout_prob", "projection_dropout", "dropout", "drop_path_rate")
# of the largest difference to the root mean square of a layer's output
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_ROWS, _COLUMNS = 3, 4  # patches of the images that a layer is tried on


def _never(tower: nn.Module, index: int) -> bool:
    return False


@dataclass(frozen=True)
class TowerKind:
    """What one kind of vision encoder tells.

    classes: of the encoder. path: where it is, from the outer model. blocks: where its list of layers may be, from the
    encoder. places: the parts of `TowerLayer`, from a layer; those that a layer does not have are left out. attention:
    the module of a layer that knows its heads. rows(tower, arguments): where the rows of a call of the encoder lie.
    block_arguments(rows, cos, sin): what its layers are called with beside the hidden states of `rows`. pixels(tower,
    arguments, merge): what the encoder is given of every token of merge x merge patches, (tokens, values), image after
    image in raster order. is_batched: whether hidden states are (images, rows, hidden), else (rows, hidden).
    """

    classes: tuple[str, ...]
    path: str
    blocks: tuple[str, ...]
    places: Mapping[str, str]
    attention: str
    rows: Callable[[nn.Module, dict], TowerRows]
    block_arguments: Callable[[TowerRows, torch.Tensor, torch.Tensor], dict]
    pixels: Callable[[nn.Module, dict, int], torch.Tensor]
    scales: tuple[str, str] | None = None
    is_windowed: Callable[[nn.Module, int], bool] = _never
    has_globals: bool = False
    is_batched: bool = True


def blocks_of(kind: TowerKind, module: nn.Module) -> nn.ModuleList:
    """The layers of an encoder."""
    for path in kind.blocks:
        try:
            return attrgetter(path)(module)
        except AttributeError:
            continue
    raise PatchError(f"tower: got a {type(module).__name__} without {' or '.join(kind.blocks)}, expected its layers")


def find_tower(kinds: tuple[TowerKind, ...], outer: nn.Module, asked_by: str) -> tuple[TowerKind, nn.Module]:
    """The encoder of an outer model, of one of the kinds that its family knows. Raises PatchError without one, that
    says who asked for it."""
    given = "no encoder that it knows"
    for kind in kinds:
        module = getattr(outer, kind.path, None)
        names = {cls.__name__ for cls in type(module).__mro__}
        if names.intersection(kind.classes):
            return kind, module
        given = type(module).__name__
    known = ", ".join(name for kind in kinds for name in kind.classes) or "none yet in this family"
    raise PatchError(
        f"{asked_by}: tower: got a {type(outer).__name__} with {given}, expected an encoder of {known}; a plan without "
        "a tower section runs"
    )


def read_tower(kind: TowerKind, module: nn.Module) -> Tower:
    """The executor's view of an encoder. Raises PatchError if its layers have another structure, or drop at random."""
    name = type(module).__name__
    for setting in _DROPOUTS:
        if getattr(module.config, setting, 0.0):
            raise PatchError(f"{name}: got {setting}={getattr(module.config, setting)}, expected 0")
    layers = [_read_layer(kind, module, index, block) for index, block in enumerate(blocks_of(kind, module))]
    sizes = set()
    for layer, block in zip(layers, blocks_of(kind, module)):
        attention = attrgetter(kind.attention)(block)
        sizes.add((attention.num_heads, attention.head_dim, layer.module("up").out_features))
    if len(sizes) != 1:
        raise PatchError(f"{name}: got layers of {len(sizes)} sizes, expected one number of heads and neurons for all")
    return Tower(tuple(layers), *sizes.pop(), kind.has_globals)


def _read_layer(kind: TowerKind, module: nn.Module, index: int, block: nn.Module) -> TowerLayer:
    name = type(module).__name__
    if "FSDPModule" in {cls.__name__ for cls in type(block).__mro__}:
        raise PatchError(
            f"{name}: got fully_shard on layer {index}, expected whole layers (patch the model, then wrap it)"
        )
    parts = {}
    for part, path in kind.places.items():
        *owners, place = path.split(".")
        owner = attrgetter(".".join(owners))(block) if owners else block
        if not hasattr(owner, place):
            raise PatchError(f"{name}: got a layer {index} without {path}, expected a pre-norm encoder of its kind")
        if not isinstance(getattr(owner, place), nn.Identity):  # what some models of the kind do without
            parts[part] = owner, place
            if isinstance(getattr(owner, place), nn.Module):
                check_parameters(f"{path} of vision layer {index}", owner, getattr(owner, place))
    if kind.scales and hasattr(block, "_hf_hook"):
        raise PatchError(
            f"{name}: got an offload hook on layer {index}, whose {kind.scales[0]} is there only while the layer is "
            "called, expected hooks on its linear layers and norms, or a tower that is not offloaded"
        )
    places = (*kind.places.values(), *(kind.scales or ()))
    for parameter, _ in block.named_parameters():
        if not any(parameter == path or parameter.startswith(f"{path}.") for path in places):
            raise PatchError(f"{name}: got {parameter} in layer {index}, expected {', '.join(places)} alone")
    attention = attrgetter(kind.attention)(block)
    width = attention.num_heads * attention.head_dim
    fused = {}
    if "qkv" in parts:
        for number, part in enumerate(("query", "key", "value")):
            parts[part], fused[part] = parts["qkv"], range(number * width, (number + 1) * width)
    scale = getattr(attention, "scaling", getattr(attention, "scale", None))
    if not isinstance(scale, float):
        raise PatchError(f"{name}: got a {type(attention).__name__} with scale {scale!r}, expected a number")
    return TowerLayer(parts, scale, fused, {}, kind.scales, kind.is_windowed(module, index))


@torch.no_grad()
def check_tower(kind: TowerKind, module: nn.Module, tower: Tower, backend: Backend) -> None:
    """Raise PatchError if a layer under the dense plan differs from the encoder's own on a few rows: the first and the
    last of each kind. Not asked on the meta device, or where somebody listens to the layers' calls."""
    blocks = blocks_of(kind, module)
    chosen = {}
    for index, layer in enumerate(tower.layers):
        chosen.setdefault(layer.windowed, [index, index])[1] = index
    executor = None
    for index in sorted({index for ends in chosen.values() for index in ends}):
        block, weight = blocks[index], next(blocks[index].parameters())
        if weight.is_meta or listens(vars(block)):
            continue
        if executor is None:
            executor = TowerExecutor(tower, VisualPlan.dense(len(tower.layers)), backend)
        hidden, rows, cos, sin = _tried(tower, weight)
        own = hidden.unflatten(0, (2, -1)) if kind.is_batched else hidden
        theirs = block(own, **kind.block_arguments(rows, cos, sin))
        run = TowerRun(executor, TowerTables.of(rows, weight.device), len(blocks))
        ours = run.layer(index, own, None if kind.is_batched else (cos, sin))
        if not isinstance(theirs, torch.Tensor) or theirs.shape != ours.shape:
            given = f"{type(theirs).__name__} of layer {index}"
            raise PatchError(f"{type(module).__name__}: got {given}, expected one tensor like its input")
        difference = ((ours - theirs).abs().max() / theirs.pow(2).mean().sqrt()).item()
        if not difference <= _TOLERANCES.get(weight.dtype, 0.1):
            raise PatchError(
                f"{type(module).__name__}: got layer {index} that differs from a plain pre-norm encoder's by "
                f"{difference:.1g} of its output, expected one that computes what its modules' names say"
            )


def _tried(tower: Tower, like: torch.Tensor):
    """Hidden states, places and angles of two small images."""
    generator = torch.Generator().manual_seed(0)
    globals_, patches = int(tower.has_globals), _ROWS * _COLUMNS
    count = 2 * (globals_ + patches)
    width = tower.layers[0].module("output").out_features
    places = [(image, -1, -1) for image in range(2)] if globals_ else []
    places += [(image, place // _COLUMNS, place % _COLUMNS) for image in range(2) for place in range(patches)]
    places.sort()
    sequence, y, x = torch.tensor(places).numpy().T
    turns = torch.rand(count, tower.head_dim // 2, generator=generator).repeat(1, 2).to(like.device)
    hidden = torch.randn(count, width, generator=generator).to(like)
    return hidden, TowerRows(sequence, y, x, None if globals_ else sequence), turns.cos(), turns.sin()
