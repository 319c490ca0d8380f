"""The training decoder under a plan: visual rows in a lane of their own, as long as a later layer reads them.

Only what a plan says is computed, but for heads (masked) and FFN neurons (zeroed).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vis_sparse.eval.deep.decoder import Decoder, Heads, Swiglu, rotations
from vis_sparse.plans.layer_plan import Neighborhood
from vis_sparse.plans.schedule import LayerWork

HIDDEN = -1e4  # beside scores: not read
# Residual streams and what the last block adds to them, of text rows and of visual rows.
Lanes = tuple[Tensor, Tensor, Tensor, Tensor]


class PlannedDecoder(Decoder):
    """work: of each layer ("exclude" semantics). Every sequence has one image, a `side` x `side` grid, at `visual`."""

    def __init__(self, work: Sequence[LayerWork], visual: slice, side: int, *args, **options):
        super().__init__(*args, **options)
        if any(item.tokens for item in work):
            raise ValueError("work: got layers that drop tokens, expected none: every visual row is kept in its place")
        self.work, self.visual, self.side = work, visual, side

    def forward(self, embedded: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """As `Decoder.forward`; rows of visual tokens come back as zeros."""
        return self.rest(self.lanes(embedded), positions, visible)

    def lanes(self, embedded: Tensor) -> Lanes:
        """What enters the first layer."""
        parts = embedded[:, self._text(embedded.shape[1])], embedded[:, self.visual]
        return tuple(part for rows in parts for part in (rows.float(), torch.zeros_like(rows, dtype=self.dtype)))

    def _text(self, length: int) -> Tensor:
        return torch.cat([torch.arange(self.visual.start), torch.arange(self.visual.stop, length)])

    def rest(
        self, lanes: Lanes, positions: Tensor, visible: Tensor, first: int = 0, kept: list[Lanes] | None = None
    ) -> Tensor:
        """`forward` from layer `first` on; what enters a layer is appended to `kept`."""
        length, at = visible.shape[-1], self.visual
        text = self._text(length)
        heads = self.config.num_attention_heads, self.config.num_key_value_heads
        epsilon = self.config.rms_norm_eps
        turns = [rotations(positions[:, rows], self.config) for rows in (text, at)]
        bias = torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, HIDDEN)[:, :, None]
        text_bias, visual_bias = bias[..., text, :][..., text], bias[..., text, :][..., at]
        hidden, added, seen, changed = lanes
        for layer, work in enumerate(self.work[first:], first):
            if kept is not None:
                kept.append((hidden, added, seen, changed))
            hidden, rows = self.add_and_norm(hidden, added, self.norms[2 * layer], epsilon)
            query, key, value = Heads.apply(
                self._linears(layer, 0, rows), *turns[0], *heads, self.heads_of, self.rows_of
            )
            keys, values, mask = key, value, text_bias
            if work.key_heads:
                seen, rows = self.add_and_norm(seen, changed, self.norms[2 * layer], epsilon)
                changed = torch.zeros_like(changed)
                visual_query, visual_key, visual_value = Heads.apply(
                    self._linears(layer, 0, rows), *turns[1], *heads, self.heads_of, self.rows_of
                )
            if work.reads:
                keys, values = torch.cat([key, visual_key], dim=2), torch.cat([value, visual_value], dim=2)
                mask = self._cat(text_bias, visual_bias + self._inactive(work.value_heads))
            added = self._linears(layer, 1, self._attend(query, keys, values, mask))
            if work.query_heads:
                before = slice(0, at.start)
                keys = torch.cat([key[:, :, before], visual_key], dim=2)
                values = torch.cat([value[:, :, before], visual_value], dim=2)
                near = self._near(work.attention)
                read = self._attend(visual_query, keys, values, self._cat(near.new_zeros(len(near), at.start), near))
                active = (self._inactive(work.query_heads) == 0).to(read.dtype).flatten()
                changed = self._linears(layer, 1, read * active.repeat_interleave(self.config.head_dim))
            hidden, rows = self.add_and_norm(hidden, added, self.norms[2 * layer + 1], epsilon)
            added = self._ffn(layer, rows)
            if work.neurons not in (0, ()):
                seen, rows = self.add_and_norm(seen, changed, self.norms[2 * layer + 1], epsilon)
                changed = self._ffn(layer, rows, work.neurons)
        last = self.add_and_norm(hidden, added, self.norm, epsilon)[1]
        return last.new_zeros(len(last), length, last.shape[-1]).index_copy(1, text, last)

    def _ffn(self, layer: int, rows: Tensor, neurons: int | tuple[int, ...] | None = None) -> Tensor:
        inner = Swiglu.apply(self._linears(layer, 2, rows), self.swiglu, self.swiglu_grads)
        if neurons is not None:
            kept = inner.new_zeros(inner.shape[-1])
            kept[slice(neurons) if isinstance(neurons, int) else list(neurons)] = 1
            inner = inner * kept
        return self._linears(layer, 3, inner)

    def _inactive(self, heads: Sequence[int]) -> Tensor:
        """(kv_heads, group, 1, 1): 0 for active heads, `HIDDEN` for the others."""
        bias = torch.full((self.config.num_attention_heads,), HIDDEN, dtype=self.dtype)
        bias[list(heads)] = 0
        return bias.view(self.config.num_key_value_heads, -1, 1, 1)

    def _near(self, attention: str | Neighborhood) -> Tensor:
        """(N, N): which visual tokens a visual token reads."""
        order = torch.arange(self.side**2)
        y, x = order // self.side, order % self.side
        allowed = order[:, None] >= order
        if isinstance(attention, Neighborhood):
            assert attention.stride == 1
            near = [(axis[:, None] - axis).abs() <= attention.radius for axis in (y, x)]
            allowed = near[0] & near[1] & (allowed | (attention.direction == "both"))
        return torch.zeros(allowed.shape, dtype=self.dtype).masked_fill_(~allowed, HIDDEN)

    @staticmethod
    def _cat(left: Tensor, right: Tensor) -> Tensor:
        """Biases of keys beside each other, whole."""
        shape = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        return torch.cat([left.expand(*shape, -1), right.expand(*shape, -1)], dim=-1).contiguous()
