"""KV blocks that a plan saves room in: layers in which text reads text alone hold no block for visual tokens.

Layers of two kinds get block tables of their own: those that hold no visual key under the engine's default plan, and
the others. vLLM calls such a model hybrid, and shares one pool of blocks among the groups of its layers. For the first
kind the scheduler puts the null block where a request's visual tokens would lie (layout B, see `tables`), or asks for
no more blocks than text fills (layout A). Runs in the process of the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from typing import ClassVar

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from .groups import unseen_plans
from .kinds import TEXT, LayerKinds
from .requests import NOTE, visual_ranges
from .step import merged_segments
from .tables import empty_columns, text_tokens

KVCacheSpecRegistry._ensure_registered()  # a registry with our kinds alone would pass for a full one


@dataclass(frozen=True)
class _Room:
    """Which blocks of a request hold nothing."""

    segments: list[tuple[int, int]]
    compact: bool
    columns: frozenset[int]

    def tokens(self, count: int) -> int:
        """Of the first `count`, those that have a place in the table."""
        return text_tokens(self.segments, count) if self.compact else count

    def empty(self, first: int, end: int) -> int:
        return sum(column in self.columns for column in range(first, end))


class UnseenManager(FullAttentionManager):
    """Blocks of layers that hold no visual key of requests under `UnseenSpec.plans`."""

    supports_fine_grained_hash_lookup: ClassVar[bool] = False
    _looked_up: ClassVar[_Room | None] = None

    def __init__(self, kv_cache_spec, **kwargs):
        super().__init__(kv_cache_spec, **kwargs)
        self._rooms: dict[str, _Room] = {}

    def room(self, request) -> _Room | None:
        """None if it is an ordinary request."""
        extra = (request.sampling_params and request.sampling_params.extra_args) or {}
        note = extra.get(NOTE)
        segments = merged_segments(visual_ranges(request.mm_features or ()))
        if note is None or note["plan"] not in self.kv_cache_spec.plans or not segments:
            return None
        columns = () if note["compact"] else empty_columns(segments, self.block_size)
        return _Room(segments, note["compact"], frozenset(columns))

    def meet(self, request) -> None:
        """Called before blocks are asked for."""
        if request.request_id not in self._rooms:
            self._rooms[request.request_id] = self.room(request)

    @contextmanager
    def looking_up(self, request):
        UnseenManager._looked_up = self.room(request)
        try:
            yield
        finally:
            UnseenManager._looked_up = None

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, alignment_tokens, **kwargs
    ):
        size, room = kv_cache_spec.block_size, cls._looked_up
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        found = tuple([] for _ in kv_cache_group_ids)
        for column, each in enumerate(islice(hashes, max_length // size)):
            if room is not None and column in room.columns:
                blocks = [block_pool.null_block] * len(found)
            else:
                blocks = block_pool.get_cached_block(each, kv_cache_group_ids)
            if not blocks:
                break
            for of_group, block in zip(found, blocks):
                of_group.append(block)
        length = len(found[0]) * size // alignment_tokens * alignment_tokens
        for of_group in found:
            del of_group[length // size :]
        return found, length

    def get_num_blocks_to_allocate(self, request_id, num_tokens, new_computed_blocks, *args, **kwargs):
        room = self._rooms.get(request_id)
        if room is None:
            return super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        asked = room.tokens(num_tokens)
        number = super().get_num_blocks_to_allocate(request_id, asked, new_computed_blocks, *args, **kwargs)
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        return number - room.empty(held, -(-asked // self.block_size))

    def allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model):
        room = self._rooms.get(request_id)
        if room is None or room.compact:
            asked = num_tokens if room is None else room.tokens(num_tokens)
            return super().allocate_new_blocks(request_id, asked, num_tokens_main_model)
        blocks = self.req_to_blocks[request_id]
        columns = range(len(blocks), -(-num_tokens // self.block_size))
        real = self.block_pool.get_new_blocks(len(columns) - room.empty(columns.start, columns.stop))
        if self.records_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in real)
        left = iter(real)
        added = [self._null_block if column in room.columns else next(left) for column in columns]
        blocks.extend(added)
        return added

    def cache_blocks(self, request, *args, **kwargs):
        room = self._rooms.get(request.request_id)
        if room is None or not room.compact:  # layout A shares nothing
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id):
        self._rooms.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


@register_kv_cache_spec(FullAttentionManager)
@dataclass(frozen=True, kw_only=True)
class SeenSpec(FullAttentionSpec):
    """A layer that holds visual keys under the default plan."""

    @classmethod
    def merge(cls, specs):
        return KVCacheSpec.merge.__func__(cls, specs)  # the base's would take the other kind in


@register_kv_cache_spec(UnseenManager)
@dataclass(frozen=True, kw_only=True)
class UnseenSpec(FullAttentionSpec):
    """A layer that holds none. plans: those under which no layer of this kind does."""

    plans: tuple[int, ...] = ()

    @classmethod
    def merge(cls, specs):
        return KVCacheSpec.merge.__func__(cls, specs)


def spec_of(layers: Sequence[LayerKinds], index: int, spec: FullAttentionSpec) -> FullAttentionSpec:
    """`spec`, of a layer's own making, as one of the two kinds."""
    own = {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec)}
    if layers[index].attention[0] != TEXT:
        return SeenSpec(**own)
    return UnseenSpec(**own, plans=unseen_plans(layers))
