"""SmolLM2's decoder for training: frozen weights in bf16, low-rank differences and the residual stream in fp32.

Maps of the same rows are one product, and the difference goes with it: rows and what `a` makes of them side by side,
times the frozen weight and `b` side by side. What is not a product is compiled.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig

RANK = 12
SCALE = 2.0  # of the difference: alpha / rank
NORMS = ("input_layernorm", "post_attention_layernorm")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # of the same rows
LINEARS = tuple(name for group in GROUPS for name in group)


def shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's linear maps."""
    width, inner = config.hidden_size, config.intermediate_size
    query, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    sizes = ((query, width), (kv, width), (kv, width), (width, query), (inner, width), (inner, width), (width, inner))
    return dict(zip(LINEARS, sizes, strict=True))


def place_of(name: str) -> str:
    """Where a linear map is in a decoder layer."""
    return f"{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}"


class Decoder(nn.Module):
    """`lora`: for each layer and linear map `<layer>-<name>-a` (rank, in) and `-b` (out, rank), fp32; b starts at zero.

    dtype: of the frozen weights and the products. `refresh` has to be called after every change of `lora`.
    """

    def __init__(
        self, config: LlamaConfig, state: dict[str, Tensor], dtype=torch.bfloat16, rank: int = RANK, seed: int = 0
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.config, self.dtype, self.rank = config, dtype, rank
        self.embeddings = state["model.embed_tokens.weight"].to(dtype)
        self.norm = state["model.norm.weight"].float()
        self.norms, self.weights, self.lora = [], [], nn.ParameterDict()
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            self.norms += [state[f"{prefix}{name}.weight"].float() for name in NORMS]
            for group in GROUPS:
                frozen = torch.cat([state[f"{prefix}{place_of(name)}.weight"] for name in group])
                self.weights.append(F.pad(frozen.to(dtype), (0, rank * len(group))))
            for name, (out, inside) in shapes(config).items():
                self.lora[f"{layer}-{name}-a"] = nn.Parameter(torch.randn(rank, inside) / math.sqrt(inside))
                self.lora[f"{layer}-{name}-b"] = nn.Parameter(torch.zeros(out, rank))
        for function in POINTWISE:
            setattr(self, function.__name__, function)
        self.refresh()

    def compile_pointwise(self) -> None:
        for function in POINTWISE:
            setattr(self, function.__name__, torch.compile(function, dynamic=False))

    @torch.no_grad()
    def refresh(self) -> None:
        """Put `lora`'s b beside the frozen weights."""
        for layer in range(self.config.num_hidden_layers):
            for number, group in enumerate(GROUPS):
                weight, first = self.weights[layer * len(GROUPS) + number], 0
                column = weight.shape[1] - self.rank * len(group)
                for part, name in enumerate(group):
                    b = self.lora[f"{layer}-{name}-b"]
                    at = slice(column + part * self.rank, column + (part + 1) * self.rank)
                    weight[first : first + len(b), at] = SCALE * b
                    first += len(b)

    def forward(self, embedded: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """(B, L, width) of embeddings, (B, L) int64, (B, 1, L, L) bool to the normed hidden states (B, L, width)."""
        config, epsilon = self.config, self.config.rms_norm_eps
        cos, sin = rotations(positions, config)
        bias = torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, -1e4)
        heads = config.num_attention_heads, config.num_key_value_heads
        hidden, added = embedded.float(), torch.zeros_like(embedded, dtype=self.dtype)
        for layer in range(config.num_hidden_layers):
            hidden, rows = self.add_and_norm(hidden, added, self.norms[2 * layer], epsilon)
            rows = self._linears(layer, 0, rows)
            query, key, value = Heads.apply(rows, cos, sin, *heads, self.heads_of, self.rows_of)
            added = self._linears(layer, 1, self._read(query, key, value, bias))
            hidden, rows = self.add_and_norm(hidden, added, self.norms[2 * layer + 1], epsilon)
            added = self._linears(layer, 3, Swiglu.apply(self._linears(layer, 2, rows), self.swiglu, self.swiglu_grads))
        return self.add_and_norm(hidden, added, self.norm, epsilon)[1]

    def _read(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Causal attention in two parts: what the first rows may not see is not computed."""
        half, length = query.shape[2] // 2, query.shape[2]
        parts = []
        for rows in (slice(0, half), slice(half, length)):
            seen = slice(0, rows.stop)
            parts.append(
                self._attend(query[:, :, rows], key[:, :, seen], value[:, :, seen], bias[:, :, None, rows, seen])
            )
        return torch.cat(parts, dim=1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Attention written out: SDPA's backward takes twice as long here. query (B, query_heads, Q, head_dim), key and
        value (B, kv_heads, K, head_dim), bias broadcastable to (B, kv_heads, group, Q, K); returns (B, Q, width)."""
        kv_heads, head_dim = key.shape[1], key.shape[3]
        asked = query.unflatten(1, (kv_heads, -1))
        scores = (asked.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, asked.shape[2:4])
        shares = self.shares(scores, bias, head_dim**-0.5)
        read = (shares.flatten(2, 3) @ value).unflatten(2, asked.shape[2:4])
        return read.permute(0, 3, 1, 2, 4).flatten(2)

    def _linears(self, layer: int, number: int, rows: Tensor) -> Tensor:
        names = [f"{layer}-{name}" for name in GROUPS[number]]
        a = torch.cat([self.lora[f"{name}-a"] for name in names]).to(self.dtype)
        found = Linears.apply(
            rows.flatten(0, 1),
            a,
            self.weights[layer * len(GROUPS) + number],
            *(self.lora[f"{name}-b"] for name in names),
        )
        return found.unflatten(0, rows.shape[:2])

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embeddings)


class Linears(torch.autograd.Function):
    """(rows, in), all a (parts * rank, in), weights beside b (out, in + parts * rank), and each b (for its gradient) to
    (rows, out)."""

    @staticmethod
    def forward(ctx, rows, a, weight, *bs):
        both = torch.cat([rows, rows @ a.t()], dim=1)
        ctx.save_for_backward(both, a, weight)
        ctx.outs = [len(b) for b in bs]
        return both @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        both, a, weight = ctx.saved_tensors
        inside = a.shape[1]
        rows, low = both[:, :inside], both[:, inside:]
        through = grad @ weight
        grad_low = through[:, inside:]
        grad_bs = [
            SCALE * (part.t() @ side).float()
            for part, side in zip(
                grad.split(ctx.outs, dim=1), low.split(low.shape[1] // len(ctx.outs), dim=1), strict=True
            )
        ]
        return torch.addmm(through[:, :inside], grad_low, a), grad_low.t() @ rows, None, *grad_bs


def rotations(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (B, L, 1, head_dim / 2) fp32."""
    half = config.head_dim // 2
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    angles = (positions[..., None] * frequencies)[:, :, None]
    return angles.cos(), angles.sin()


def add_and_norm(hidden: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The residual stream with what a block adds, and its RMSNorm in the block's dtype."""
    hidden = hidden + added
    normed = hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + epsilon) * weight
    return hidden, normed.to(added.dtype)


def rotated(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., head_dim) turned, cos and sin (..., head_dim / 2)."""
    left, right = rows.float().unflatten(-1, (2, -1)).unbind(dim=-2)
    return torch.stack([left * cos - right * sin, right * cos + left * sin], dim=-2).flatten(-2).to(rows.dtype)


def heads_of(rows: Tensor, cos: Tensor, sin: Tensor, query_heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, out) to rotated queries (B, query_heads, L, head_dim), rotated keys and values (B, kv_heads, L,
    head_dim)."""
    query, key, value = rows.unflatten(2, (query_heads + 2 * kv_heads, -1)).split(
        [query_heads, kv_heads, kv_heads], dim=2
    )
    query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    return tuple(part.transpose(1, 2).contiguous() for part in (query, key, value))


def rows_of(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `heads_of` was given: turned back."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return torch.cat([rotated(query, cos, -sin), rotated(key, cos, -sin), value], dim=2).flatten(2)


class Heads(torch.autograd.Function):
    """`heads_of`; a rotation's derivative is the rotation back."""

    @staticmethod
    def forward(ctx, rows, cos, sin, query_heads, kv_heads, heads_of, rows_of):
        ctx.save_for_backward(cos, sin)
        ctx.rows_of = rows_of
        return heads_of(rows, cos, sin, query_heads, kv_heads)

    @staticmethod
    def backward(ctx, query, key, value):
        return ctx.rows_of(query, key, value, *ctx.saved_tensors), *[None] * 6


def shares(scores: Tensor, bias: Tensor, scaling: float) -> Tensor:
    return (scores.float() * scaling + bias).softmax(dim=-1).to(scores.dtype)


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(rows.dtype)


def swiglu_grads(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu`'s gradients to its two halves."""
    gate, up = rows.float().chunk(2, dim=-1)
    grad, share = grad.float(), gate.sigmoid()
    return (grad * up * share * (1 + gate * (1 - share))).to(rows.dtype), (grad * gate * share).to(rows.dtype)


class Swiglu(torch.autograd.Function):
    """`swiglu`; the halves of the gradient are put together uncompiled, which is twice as fast."""

    @staticmethod
    def forward(ctx, rows, swiglu, swiglu_grads):
        ctx.save_for_backward(rows)
        ctx.grads = swiglu_grads
        return swiglu(rows)

    @staticmethod
    def backward(ctx, grad):
        return torch.cat(ctx.grads(*ctx.saved_tensors, grad), dim=-1), None, None


POINTWISE = (add_and_norm, heads_of, rows_of, shares, swiglu, swiglu_grads)
