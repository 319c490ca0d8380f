"""An engine's attention backend, with metadata of the queries that a layer has under the plans."""

from __future__ import annotations

from collections.abc import Callable

from .errors import ServingError
from .runtime import Runtime


def planned_backend(base: type, runtime: Runtime, kinds: tuple[int, ...]) -> type:
    """`base` for a layer of these kinds. Runners group layers by the name of the class."""
    builder = base.get_builder_cls()

    class PlannedBuilder(builder):
        supports_update_block_table = False

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if runtime.loaded.block % self.kv_cache_spec.block_size:
                raise ServingError(
                    f"got kernel blocks of {self.kv_cache_spec.block_size} tokens, expected a divisor of the "
                    f"{runtime.loaded.block} by which requests are laid out (set --block-size)"
                )

        @classmethod
        def get_cudagraph_support(cls, *args, **kwargs):
            # a recorded graph of the whole model replays the metadata's buffers, and these are new in every step
            return type(super().get_cudagraph_support(*args, **kwargs)).NEVER

        def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
            common = runtime.attention(kinds, self.layer_names, common_attn_metadata, self.kv_cache_spec.block_size)
            return None if common is None else super().build(common_prefix_len, common, fast_build)

    name = f"Planned{base.__name__}{''.join(map(str, kinds))}"
    return type(name, (base,), {"get_builder_cls": staticmethod(lambda: PlannedBuilder)})


def update_with_copies(update: Callable, runtime: Runtime, name: str) -> Callable:
    """The engine's write of keys, then layout B's copies of block ends into block heads, each before a write anew.

    Whole blocks are copied, in whatever order an engine keeps keys in one; the write anew puts right what a copy laid
    over the step's own keys.
    """

    def write(layer, key, value, kv_cache, slot_mapping):
        update(layer, key, value, kv_cache, slot_mapping)
        for source, target in runtime.copies.get(name, ()):
            kv_cache[target] = kv_cache[source]
            update(layer, key, value, kv_cache, slot_mapping)

    return write
