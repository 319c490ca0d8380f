"""Plans inside a checkpoint: the `vis_sparse` block of its config.json, or of vis_sparse.json in an adapter's folder.

The block is JSON, holds resolved plans (heads as masks, neurons as indices) and stays small: the active heads and the
neurons of a layer are written as runs ("0-3, 7"), or as packed bits where that is shorter (an eighth of a byte a
neuron). Nothing beside the file is needed to read it.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .atomic_write import is_file
from .layer_plan import PlanError, brief, check_int
from .plan import MOST_LAYERS, VisualPlan, recipe_of
from .yaml_format import checked_fields, plan_data

KEY = "vis_sparse"  # in config.json, which plain transformers ignores
ADAPTER_FILE = "vis_sparse.json"
FORMAT = 1
_BITS = "bits:"
_MOST_UNITS = 1 << 24  # heads or neurons of a layer


def to_block(
    plans: Mapping[str, VisualPlan], num_heads: int, num_neurons: int, tower: tuple[int, int] | None = None
) -> dict:
    """Resolved plans by name as JSON data; the first one is the default.

    num_heads, num_neurons: of a layer of the model that they were resolved for; tower: of a layer of its vision
    encoder, where plans have a section for it that was resolved.
    """
    written = {}
    for name, plan in plans.items():
        data = plan_data(plan)
        _compact(data, num_heads, num_neurons)
        if "tower" in data and tower is not None:
            _compact(data["tower"], *tower)
        written[name] = data
    sizes = {"heads": num_heads, "neurons": num_neurons}
    if tower is not None:
        sizes["tower"] = {"heads": tower[0], "neurons": tower[1]}
    return {"format": FORMAT, **sizes, "default": next(iter(plans)), "plans": written}


def _compact(data: dict, heads: int, neurons: int) -> None:
    for layer in data["layers"].values():
        if isinstance(layer, dict):
            _write(layer, "heads", heads, lambda mask: np.flatnonzero(mask).tolist())
            _write(layer, "ffn", neurons, list)


def read_block(block, origin: str = f"config.json: {KEY}") -> dict[str, VisualPlan]:
    """The plans of `to_block`, the default one first. Raises PlanError naming `origin` for anything else."""
    if not isinstance(block, dict) or "format" not in block:
        raise PlanError(f"{origin}: got {brief(block)}, expected what a patched model's save_pretrained writes")
    if block["format"] != FORMAT:
        raise PlanError(
            f"{origin}: got format {brief(block['format'])}, expected {FORMAT} (another version of vis_sparse wrote it)"
        )
    try:
        heads, neurons, plans = (block.get(name) for name in ("heads", "neurons", "plans"))
        for name, count in (("heads", heads), ("neurons", neurons)):
            check_int(name, count, 1, _MOST_UNITS)
        if not isinstance(plans, dict) or not plans or block.get("default") not in plans:
            raise PlanError(f"plans: got {brief(plans)}, expected plans by name, the default {block.get('default')!r}")
        tower = block.get("tower")
        if tower is not None:
            if not isinstance(tower, dict):
                raise PlanError(f"tower: got {brief(tower)}, expected heads and neurons of its layers")
            tower = tower.get("heads"), tower.get("neurons")
            for name, count in zip(("heads", "neurons"), tower):
                check_int(f"tower: {name}", count, 1, _MOST_UNITS)
        names = sorted(plans, key=lambda name: name != block["default"])
        return {name: _plan(plans[name], (heads, neurons), tower, name) for name in names}
    except PlanError as error:
        raise PlanError(f"{origin}: {error}") from None


def _plan(data, sizes: tuple[int, int], tower: tuple[int, int] | None, name: str) -> VisualPlan:
    where = f"plan {name!r}"
    if not isinstance(data, dict) or not isinstance(data.get("layers"), dict):
        raise PlanError(f"{where}: got {brief(data)}, expected a mapping with layers")
    check_int(f"{where}: num_layers", data.get("num_layers"), 1, MOST_LAYERS)
    data = data | {"layers": _unpacked(data["layers"], *sizes, where)}
    section = data.get("tower")
    if tower is not None and isinstance(section, dict) and isinstance(section.get("layers"), dict):
        data["tower"] = section | {"layers": _unpacked(section["layers"], *tower, f"{where}: tower")}
    return recipe_of(checked_fields(data, where)).resolve()


def _unpacked(layers: dict, heads: int, neurons: int, where: str) -> dict:
    """Layers with masks and indices in the place of what `_write` wrote."""
    unpacked = {}
    for spec, layer in layers.items():
        if isinstance(layer, dict):
            layer = dict(layer)
            for field, size in (("heads", heads), ("ffn", neurons)):
                value = layer.get(field)
                if isinstance(value, str) and value != "all":
                    found = _read(value, size, f"{where}: layers {spec}: {field}")
                    layer[field] = np.isin(np.arange(size), found).tolist() if field == "heads" else found
        unpacked[spec] = layer
    return unpacked


def plans_of_folder(folder: Path) -> dict[str, VisualPlan] | None:
    """The plans that a checkpoint's or an adapter's folder carries, the default one first; None if it has none."""
    for name in (ADAPTER_FILE, "config.json"):
        plans = plans_of_file(folder / name) if is_file(folder / name) else None
        if plans is not None:
            return plans
    return None


def plans_of_file(file: Path) -> dict[str, VisualPlan] | None:
    """The plans of a config.json or vis_sparse.json; None if it has no block."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{file}: expected JSON ({error})") from None
    block = data.get(KEY) if isinstance(data, dict) else None
    return None if block is None else read_block(block, f"{file}: {KEY}")


def _write(layer: dict, field: str, size: int, indices) -> None:
    if not isinstance(layer.get(field), list):
        return
    found = indices(layer[field])
    runs = _runs(found)
    bits = np.packbits(np.isin(np.arange(size), found))
    packed = _BITS + base64.b64encode(bits.tobytes()).decode()
    layer[field] = runs if len(runs) <= len(packed) else packed


def _runs(indices: Sequence[int]) -> str:
    """Ascending indices as "0-3, 7"."""
    pieces, start = [], None
    for index, following in zip(indices, [*indices[1:], None]):
        start = index if start is None else start
        if following != index + 1:
            pieces.append(str(index) if start == index else f"{start}-{index}")
            start = None
    return ", ".join(pieces)


def _read(text: str, size: int, where: str) -> list[int]:
    """The indices that `_write` wrote, all below `size`."""
    try:
        if text.startswith(_BITS):
            packed = np.frombuffer(base64.b64decode(text.removeprefix(_BITS), validate=True), np.uint8)
            if len(packed) != -(-size // 8):
                raise ValueError(f"{len(packed)} bytes")
            found = np.flatnonzero(np.unpackbits(packed)).tolist()
        else:
            ends = [[int(end) for end in piece.split("-")] for piece in text.split(",") if piece.strip()]
            if any(len(each) > 2 or each[-1] >= size for each in ends):
                raise ValueError("an index out of range")
            found = [index for each in ends for index in range(each[0], each[-1] + 1)]
        if found and found[-1] >= size or found != sorted(set(found)):
            raise ValueError("indices out of range or order")
        return found
    except (ValueError, binascii.Error) as error:
        raise PlanError(f"{where}: got {brief(text)}, expected ascending runs below {size} ({error})") from None
