"""Small random vision encoders of each kind, their calls, and random plans for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import transformers as hf
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vis_sparse.patches.tower import TowerKind
from vis_sparse.patches.tower_qwen import QWEN2_5_TOWER, QWEN2_TOWER, QWEN3_TOWER
from vis_sparse.patches.tower_vit import CLIP, INTERN_VIT, SIGLIP
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood, TokenBudget
from vis_sparse.plans.plan import VisualPlan

from .tower_oracle import Places

DEPTH, HEADS, WIDTH, NEURONS = 4, 4, 32, 32
_SIZES = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=NEURONS)
_QWEN = dict(depth=DEPTH, num_heads=HEADS, hidden_size=WIDTH, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
GRIDS = [[1, 4, 6], [2, 10, 4], [1, 2, 2]]  # of ragged images and of a video of two frames


@dataclass(frozen=True)
class Names:
    """Where the oracle finds what it needs of a layer."""

    attention: Callable
    projected: Callable
    output: Callable
    norms: Callable
    ffn: Callable
    scales: Callable = staticmethod(lambda block: (1.0, 1.0))


def _separate(module, h):
    return module.q_proj(h), module.k_proj(h), module.v_proj(h)


def _normed(module, h):
    query, key, value = _separate(module, h)
    return module.q_norm(query), module.k_norm(key), value


_VIT = Names(
    lambda block: block.self_attn,
    _separate,
    lambda module: module.out_proj,
    lambda block: (block.layer_norm1, block.layer_norm2),
    lambda block: (None, block.mlp.fc1, block.mlp.fc2, block.mlp.activation_fn),
)
_INTERN = Names(
    lambda block: block.attention,
    _normed,
    lambda module: module.projection_layer,
    lambda block: (block.layernorm_before, block.layernorm_after),
    _VIT.ffn,
    lambda block: (block.lambda_1, block.lambda_2),
)


def _qwen_names(ffn: Callable) -> Names:
    return Names(
        lambda block: block.attn,
        lambda module, h: module.qkv(h).chunk(3, -1),
        lambda module: module.proj,
        lambda block: (block.norm1, block.norm2),
        ffn,
    )


@dataclass(frozen=True)
class Case:
    """build() makes the encoder; call: what it is called with; grids: (height, width) of the images, for ViTs."""

    name: str
    kind: TowerKind
    names: Names
    build: Callable
    has_class_token: bool = False

    def model(self, dtype=torch.float64, seed: int = 0):
        model = self.build().eval()
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise
        return model.to(dtype)

    def call(self, dtype=torch.float64, seed: int = 1) -> dict:
        generator = torch.Generator().manual_seed(seed)
        if self.is_packed:
            grid = torch.tensor(GRIDS)
            rows = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4, generator=generator, dtype=dtype)
            return {"hidden_states": rows, "grid_thw": grid}
        pixels = torch.randn(2, 3, 12, 20, generator=generator, dtype=dtype)
        return {"pixel_values": pixels} | ({} if self.kind is INTERN_VIT else {"interpolate_pos_encoding": True})

    @property
    def is_packed(self) -> bool:
        return not self.kind.is_batched

    def places(self, model) -> tuple[Places, Places | None, list[bool]]:
        """Of the rows of `call` in the layers' order: of images and frames, of windows, and which layers have those."""
        if not self.is_packed:
            y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij"))
            token = torch.full((int(self.has_class_token),), -1)
            y, x = (torch.cat([token, axis]).repeat(2) for axis in (y, x))
            return Places(torch.arange(2).repeat_interleave(len(y) // 2), y, x), None, []
        grid = torch.tensor(GRIDS)
        position = get_vision_position_ids(grid, 2)
        sizes = torch.tensor([height * width for frames, height, width in GRIDS for _ in range(frames)])
        part = torch.arange(len(sizes)).repeat_interleave(sizes)
        if self.kind is not QWEN2_5_TOWER:
            return Places(part, *position.T), None, []
        order, ends = get_vision_window_index(grid, 2, model.window_size, model.patch_size)
        order = (4 * order[:, None] + torch.arange(4)).flatten()
        window = torch.arange(len(ends) - 1).repeat_interleave(ends.diff())
        places, (y, x) = Places(part[order], *position[order].T), position[order].T
        windowed = [index not in model.fullatt_block_indexes for index in range(DEPTH)]
        return places, Places(window, y, x), windowed


CASES = {
    case.name: case
    for case in (
        Case("CLIP", CLIP, _VIT, lambda: hf.CLIPVisionModel(_square(hf.CLIPVisionConfig)), True),
        Case("SigLIP", SIGLIP, _VIT, lambda: hf.SiglipVisionModel(_square(hf.SiglipVisionConfig))),
        Case("InternViT", INTERN_VIT, _INTERN, lambda: _intern(False), True),
        Case("InternViT with norms", INTERN_VIT, _INTERN, lambda: _intern(True), True),
        Case(
            "Qwen2-VL",
            QWEN2_TOWER,
            _qwen_names(lambda block: (None, block.mlp.fc1, block.mlp.fc2, block.mlp.act)),
            lambda: _qwen(
                "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", embed_dim=WIDTH, mlp_ratio=1
            ),
        ),
        Case(
            "Qwen2.5-VL",
            QWEN2_5_TOWER,
            _qwen_names(lambda block: (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj, block.mlp.act_fn)),
            lambda: _qwen(
                "qwen2_5_vl",
                "Qwen2_5_VisionTransformerPretrainedModel",
                intermediate_size=NEURONS,
                out_hidden_size=8,
                window_size=16,
                fullatt_block_indexes=[1],
            ),
        ),
        Case(
            "Qwen3-VL",
            QWEN3_TOWER,
            _qwen_names(lambda block: (None, block.mlp.linear_fc1, block.mlp.linear_fc2, block.mlp.act_fn)),
            lambda: _qwen(
                "qwen3_vl",
                "Qwen3VLVisionModel",
                intermediate_size=NEURONS,
                out_hidden_size=8,
                num_position_embeddings=16,
                deepstack_visual_indexes=[0, 2],
            ),
        ),
    )
}


def _square(config, **more):
    return config(**_SIZES, image_size=16, patch_size=4, **more)


def _intern(normed: bool):
    config = hf.InternVLVisionConfig(**_SIZES, image_size=(16, 16), patch_size=(4, 4), use_qk_norm=normed)
    return hf.InternVLVisionModel(config)


def _qwen(module: str, name: str, **sizes):
    modeling = getattr(__import__(f"transformers.models.{module}", fromlist=["x"]), f"modeling_{module}")
    cls = getattr(modeling, name)
    return cls(cls.config_class(**_QWEN | sizes))


def random_plan(seed: int, tokens: bool = True) -> VisualPlan:
    rng = np.random.default_rng(seed)
    layers, left = [], False
    for _ in range(DEPTH):
        near = Neighborhood(int(rng.integers(3)), "both", stride=int(rng.integers(1, 4)))
        attention = rng.choice(np.array(["full", "none", near, near, near], dtype=object))
        heads = None if rng.random() < 0.4 else tuple(rng.random(HEADS) < 0.6)
        ffn = rng.choice(np.array([1.0, 0.0, 0.5, tuple(sorted(rng.choice(NEURONS, 7, False).tolist()))], dtype=object))
        by = rng.choice(["norm", "uniform"])
        budget = TokenBudget(0.6, str(by)) if tokens and rng.random() < 0.3 else None
        off = rng.random() < 0.1
        layers.append(LayerPlan.off() if off else LayerPlan(True, attention, heads, ffn, budget))
        left |= budget is not None
    return VisualPlan(tuple(layers), "tower")
