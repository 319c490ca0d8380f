"""The encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: ragged grids in one row, merged 2 x 2 behind the last layer.

Rows come merged patch by merged patch; in Qwen2.5-VL window by window. Every frame of a video attends to itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..executor.tower_tables import TowerRows
from .tower import TowerKind

_PLACES = {
    "input_norm": "norm1",
    "qkv": "attn.qkv",
    "output": "attn.proj",
    "post_norm": "norm2",
}


def _frames(tower: nn.Module, arguments: dict) -> list[np.ndarray]:
    """(rows, 3) of each frame: frame, y, x of the patches, merged patch by merged patch."""
    merge, found = tower.spatial_merge_size, []
    for frames, height, width in arguments["grid_thw"].tolist():
        y, x = np.indices((height, width))
        blocks = (height // merge, merge, width // merge, merge)
        places = [place.reshape(blocks).transpose(0, 2, 1, 3).ravel() for place in (y, x)]
        for _ in range(frames):
            found.append(np.stack([np.full(height * width, len(found)), *places], axis=1))
    return found


def _merged_patches(tower: nn.Module, arguments: dict) -> TowerRows:
    return TowerRows(*np.concatenate(_frames(tower, arguments)).T)


def _windows(tower: nn.Module, arguments: dict) -> TowerRows:
    """Of each frame window after window, merged patches in raster order within each."""
    merge = tower.spatial_merge_size
    side = tower.window_size // tower.patch_size // merge * merge
    ordered, count = [], 0
    for frame in _frames(tower, arguments):
        _, y, x = frame.T
        down, across = y // side, x // side
        # stable: rows of one merged patch stay together, and those in their order
        order = np.lexsort((x // merge, y // merge, across, down))
        window = (down * (x.max() // side + 1) + across)[order] + count
        ordered.append(np.column_stack([frame[order], window]))
        count = window.max() + 1
    return TowerRows(*np.concatenate(ordered).T)


def _is_windowed(tower: nn.Module, index: int) -> bool:
    return index not in tower.fullatt_block_indexes


def _pixels(tower: nn.Module, arguments: dict, merge: int) -> torch.Tensor:
    # (rows, values), merged patch by merged patch
    return arguments["hidden_states"].unflatten(0, (-1, merge**2)).flatten(1)


def _of_rows(rows: TowerRows, cos: torch.Tensor, sin: torch.Tensor) -> dict:
    ends = np.append(0, np.cumsum(np.bincount(rows.sequence)))
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=cos.device)
    return {"cu_seqlens": cu_seqlens, "position_embeddings": (cos, sin)}


def _kind(name: str, ffn: dict[str, str], **more) -> TowerKind:
    settings = {"rows": _merged_patches, "block_arguments": _of_rows, "pixels": _pixels, "is_batched": False, **more}
    return TowerKind((name,), "visual", ("blocks",), _PLACES | ffn, "attn", **settings)


QWEN2_TOWER = _kind(
    "Qwen2VisionTransformerPretrainedModel", {"up": "mlp.fc1", "activation": "mlp.act", "down": "mlp.fc2"}
)
QWEN2_5_TOWER = _kind(
    "Qwen2_5_VisionTransformerPretrainedModel",
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "activation": "mlp.act_fn", "down": "mlp.down_proj"},
    rows=_windows,
    is_windowed=_is_windowed,
)
QWEN3_TOWER = _kind(
    "Qwen3VLVisionModel",
    {"up": "mlp.linear_fc1", "activation": "mlp.act_fn", "down": "mlp.linear_fc2"},
)
