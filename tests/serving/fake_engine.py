"""A small engine in the manner of vLLM's first runner, on the CPU in float64: fused projections, a paged cache with
shared prefixes, chunks, one call for all requests of a step, attention metadata by builders, a context of the call.

What the plug-in does to it is what it does to vLLM; vLLM itself is tested in `tests/serving/engine`.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear, silu

from vis_sparse.serving.cuts import Shards
from vis_sparse.serving.lanes import planned_forward
from vis_sparse.serving.requests import note_of, salted
from vis_sparse.serving.runtime import Runtime, facts_of
from vis_sparse.serving.settings import Loaded, TextShape


class Mode(enum.Enum):
    NONE = 0
    PIECEWISE = 1


class Support(enum.Enum):
    NEVER = 0
    ALWAYS = 3


@dataclass
class Common:
    """vLLM's CommonAttentionMetadata, the fields that are used."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor | None = None
    is_prefilling: torch.Tensor | None = None
    mm_req_doc_ranges: dict | None = None
    req_idx: np.ndarray | None = None
    _num_computed_tokens_cache: torch.Tensor | None = None
    _token_to_req_indices_cache: torch.Tensor | None = None

    def replace(self, **changes) -> Common:
        return dataclasses.replace(self, **changes)


class Builder:
    def __init__(self, kv_cache_spec, layer_names):
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names

    @classmethod
    def get_cudagraph_support(cls):
        return Support.ALWAYS

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        assert common_attn_metadata.query_start_loc[-1] == len(common_attn_metadata.slot_mapping)
        return common_attn_metadata


class Backend:
    @staticmethod
    def get_builder_cls():
        return Builder


class Impl:
    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        block = kv_cache.shape[3]
        assert len(key) == len(slot_mapping)
        kv_cache[slot_mapping // block, 0, :, slot_mapping % block] = key
        kv_cache[slot_mapping // block, 1, :, slot_mapping % block] = value


class Linear(nn.Module):
    def __init__(self, *parts: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]).detach())
        biased = parts[0].bias is not None
        self.bias = nn.Parameter(torch.cat([part.bias for part in parts]).detach()) if biased else None
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        return linear(x, self.weight, self.bias), None


class Paged(nn.Module):
    """Attention on the paged cache, one sequence after the other."""

    def __init__(self, engine: Engine, name: str):
        super().__init__()
        self.engine = [engine]
        self.layer_name, self.impl, self.attn_backend = name, Impl(), Backend
        sizes = engine.sizes
        self.kv_cache = torch.full(
            (engine.blocks, 2, sizes.kv_heads, engine.block, sizes.head_dim), 7.0, dtype=torch.float64
        )

    def forward(self, q, k, v):
        context, sizes = self.engine[0].context, self.engine[0].sizes
        meta = context.attn_metadata[self.layer_name]
        shape = (-1, sizes.kv_heads, sizes.head_dim)
        self.impl.do_kv_cache_update(
            self, k.reshape(shape), v.reshape(shape), self.kv_cache, context.slot_mapping[self.layer_name]
        )
        q, out = q.view(-1, sizes.heads, sizes.head_dim), []
        assert len(q) == meta.num_actual_tokens == meta.query_start_loc[-1]
        for index in range(meta.num_reqs):
            rows = slice(*meta.query_start_loc[index : index + 2].tolist())
            keys = int(meta.seq_lens[index])
            read = self.kv_cache[meta.block_table_tensor[index].long()].permute(0, 3, 1, 2, 4)
            read = read.reshape(-1, 2, sizes.kv_heads, sizes.head_dim)[:keys]
            read = read.repeat_interleave(sizes.heads // sizes.kv_heads, dim=2)
            scores = torch.einsum("qhd,khd->hqk", q[rows], read[:, 0]) * sizes.head_dim**-0.5
            count = rows.stop - rows.start
            late = torch.arange(keys)[None] > torch.arange(keys - count, keys)[:, None]
            weights = scores.masked_fill(late, -torch.inf).softmax(-1)
            out.append(torch.einsum("hqk,khd->qhd", weights, read[:, 1]).reshape(count, -1))
        return torch.cat(out)


class Attention(nn.Module):
    def __init__(self, engine: Engine, source, name: str):
        super().__init__()
        sizes = engine.sizes
        self.q_size, self.kv_size, self.head_dim = (
            sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.head_dim,
        )  # fmt: skip
        self.qkv_proj = Linear(source.q_proj, source.k_proj, source.v_proj)
        self.o_proj = Linear(source.o_proj)
        self.attn, self.engine = Paged(engine, name), [engine]

    def rotary_emb(self, positions, query, key):
        """In place, as engines' kernels do it."""
        cos, sin = self.engine[0].rotary(query[None], positions[None])

        def turned(x):
            x = x.view(len(x), -1, self.head_dim)
            half = torch.cat([-x[..., self.head_dim // 2 :], x[..., : self.head_dim // 2]], -1)
            return (x * cos[0, :, None] + half * sin[0, :, None]).flatten(1)

        for x in (query, key):
            x.copy_(turned(x))
        return query, key

    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)[0].split([self.q_size, self.kv_size, self.kv_size], -1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class FFN(nn.Module):
    def __init__(self, source):
        super().__init__()
        self.gate_up_proj = Linear(source.gate_proj, source.up_proj)
        self.down_proj = Linear(source.down_proj)

    @staticmethod
    def act_fn(x):
        gate, up = x.chunk(2, -1)
        return silu(gate) * up

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class Layer(nn.Module):
    def __init__(self, engine: Engine, source, name: str):
        super().__init__()
        self.self_attn, self.mlp = Attention(engine, source.self_attn, name), FFN(source.mlp)
        self.input_layernorm, self.post_attention_layernorm = source.input_layernorm, source.post_attention_layernorm

    def forward(self, positions, x):
        x = x + self.self_attn(positions=positions, hidden_states=self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    def __init__(self, engine: Engine, source):
        super().__init__()
        self.layers = nn.ModuleList(Layer(engine, layer, f"layers.{i}") for i, layer in enumerate(source.layers))
        self.norm, self.calls = source.norm, 0

    def forward(self, positions, inputs_embeds):
        self.calls += 1
        for layer in self.layers:
            inputs_embeds = layer(positions, inputs_embeds)
        return self.norm(inputs_embeds)


class Model(nn.Module):
    def __init__(self, engine: Engine, source):
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.model = TextModel(engine, source)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        return self.language_model.model(positions, inputs_embeds)


@dataclass(eq=False)
class Request:
    """embeds: (tokens, width). key: names the tokens, for shared prefixes. ranges: inclusive, of visual tokens."""

    embeds: torch.Tensor
    key: tuple
    ranges: list[tuple[int, int]]
    note: dict
    salt: str | None
    blocks: list[int] = dataclasses.field(default_factory=list)
    done: int = 0
    rows: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def prefix(self, end: int):
        return self.salt, self.key[:end]


class Engine:
    """Runs LLaVA's text model of transformers under plans, step by step."""

    def __init__(self, source, plans, block: int = 4, blocks: int = 2000, shards: Shards | None = None):
        text, config = source.model.language_model, source.config.text_config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.sizes = SimpleNamespace(
            heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, head_dim=head_dim
        )
        self.block, self.blocks, self.rotary = block, blocks, text.rotary_emb
        self.lm_head, self.next, self.shared, self.context = source.lm_head, 1, {}, None
        self.model = Model(self, text)
        self.shape = TextShape(len(text.layers), self.sizes.heads, self.sizes.kv_heads, config.intermediate_size)
        self.loaded = Loaded(tuple(plans), block)
        self.runtime = Runtime(self.loaded, self.shape)
        self.forward = planned_forward(self.model, self.runtime, shards or Shards(), None, lambda: self.context)
        self.model.forward = self.forward
        self.layers = list(self.model.language_model.model.layers)
        # two block tables, for every other layer: layers under one backend share metadata as far as they share a table
        grouped: dict[tuple, list[str]] = {}
        for index, layer in enumerate(self.layers):
            attention = layer.self_attn.attn
            grouped.setdefault((index % 2, attention.attn_backend), []).append(attention.layer_name)
        self.builders = [
            (group, names, backend.get_builder_cls()(SimpleNamespace(block_size=block), names))
            for (group, backend), names in grouped.items()
        ]

    def request(self, embeds: torch.Tensor, key: tuple, ranges, plan: str | None = None) -> Request:
        note = note_of(self.loaded, ranges, plan)
        lays_out = frozenset(
            index
            for index in range(len(self.loaded.plans))
            if any(layer.attention[index] == 2 for layer in self.runtime.layers)
        )
        return Request(embeds, key, ranges, note, salted(note, None, self.loaded, lays_out))

    def admit(self, request: Request) -> None:
        request.blocks, request.done, request.rows = [], 0, []
        for end in range(self.block, len(request.embeds), self.block):
            if request.prefix(end) not in self.shared:
                break
            request.blocks.append(self.shared[request.prefix(end)])
            request.done = end

    @torch.no_grad()
    def step(self, requests: list[Request], counts: list[int]) -> None:
        """Logits of the rows of each request go to its `rows`."""
        for request, count in zip(requests, counts):
            while len(request.blocks) * self.block < request.done + count:
                request.blocks.append(self.next)
                self.next += 1
        start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        lengths = np.array([request.done + count for request, count in zip(requests, counts)], np.int32)
        table = torch.zeros(len(requests), 1 + max(len(request.blocks) for request in requests), dtype=torch.int32)
        for row, request in zip(table, requests):
            row[: len(request.blocks)] = torch.tensor(request.blocks)
        positions = torch.cat([torch.arange(r.done, r.done + c) for r, c in zip(requests, counts)])
        owner = torch.from_numpy(np.repeat(np.arange(len(requests)), counts))
        self.runtime.begin(requests, lambda r: facts_of(r.ranges, r.note, self.loaded, True), start, lengths)
        tables = [table, torch.where(table > 0, table + self.blocks // 2, 0)]
        metadata, before = {}, {}
        for group, names, builder in self.builders:
            own = tables[group]
            slots = own[owner, positions // self.block].long() * self.block + positions % self.block
            common = Common(
                torch.from_numpy(start), torch.from_numpy(start), torch.from_numpy(lengths), torch.from_numpy(lengths),
                len(requests), int(start[-1]), max(counts), int(lengths.max()), own, slots, positions,
                torch.ones(len(requests), dtype=torch.bool),
            )  # fmt: skip
            metadata |= dict.fromkeys(names, builder.build(0, common))
            before |= dict.fromkeys(names, slots)
        self.context = SimpleNamespace(
            attn_metadata=metadata, slot_mapping=before, cudagraph_runtime_mode=Mode.PIECEWISE
        )
        embeds = torch.cat([r.embeds[r.done : r.done + c] for r, c in zip(requests, counts)])
        hidden = self.model.forward(None, positions, None, embeds)
        assert self.context.slot_mapping is before and self.context.cudagraph_runtime_mode is Mode.PIECEWISE
        for request, count, rows in zip(requests, counts, self.lm_head(hidden).split(counts)):
            request.rows.append(rows)
            request.done += count
            for end in range(self.block, request.done + 1, self.block):
                self.shared.setdefault(request.prefix(end), request.blocks[end // self.block - 1])

    def rows(self, part: str) -> list[int]:
        """Rows that entered each layer's "qkv" or "ffn" product, those of whole layers."""
        if part == "qkv":
            return [layer.self_attn.qkv_proj.rows for layer in self.layers]
        return [layer.mlp.gate_up_proj.rows for layer in self.layers]
