"""Blocks that layers without visual keys do without, asked of vLLM's own pool; no engine is started."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vis_sparse.plans.plan import VisualPlan
from vis_sparse.serving.groups import worth_two_tables
from vis_sparse.serving.kinds import layer_kinds
from vis_sparse.serving.kv_blocks import SeenSpec, UnseenManager, UnseenSpec, spec_of

from ..test_requests import NOTE, feature

BLOCK = 16
PLAIN = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)


def kinds_of(*plans):
    return layer_kinds(plans, 8, 4, 48)


def kinds_with(text: int, other: int):
    return kinds_of(VisualPlan.vica(text + other, range(other)))


@pytest.mark.parametrize(
    "text, other, worth",
    [(0, 8, False), (8, 0, False), (24, 8, True), (6, 2, True), (16, 16, True), (1, 31, False), (13, 12, True),
     (5, 4, True), (1, 7, True), (3, 2, True), (20, 19, True)],
)  # fmt: skip
def test_whether_two_tables_save_room(text, other, worth):
    """Half of all tokens visual: what vLLM's own groups hold of both kinds, against one table for all layers."""
    layers = kinds_with(text, other)
    assert worth_two_tables(layers) is worth
    if worth:
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
            cache_config=SimpleNamespace(
                get_resolved_kv_cache_layout=lambda: SimpleNamespace(is_block_outermost=False)
            ),
            attention_config=SimpleNamespace(hisparse_config=None),
            speculative_config=None,
        )
        groups = get_kv_cache_groups(config, {f"layer {i}": spec_of(layers, i, PLAIN) for i in range(len(layers))})
        size = max(len(group.layer_names) for group in groups)
        held = {kind: sum(isinstance(g.kv_cache_spec, kind) for g in groups) * size for kind in (SeenSpec, UnseenSpec)}
        assert 2 * held[SeenSpec] + held[UnseenSpec] < 2 * len(layers)


def test_plans_that_leave_a_layers_visual_keys_out():
    layers = kinds_of(VisualPlan.vica(4, [0, 2]), VisualPlan.dense(4), VisualPlan.vica(4, [0]), VisualPlan.vtw(4, 2))
    specs = [spec_of(layers, index, PLAIN) for index in range(4)]
    assert [type(spec) for spec in specs] == [SeenSpec, UnseenSpec] * 2
    assert specs[1] == specs[3] and specs[1].plans == (0, 2)  # "vtw" reads them in layer 1
    with pytest.raises(AssertionError):
        UnseenSpec.merge(specs)


def manager():
    spec = UnseenSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32, plans=(0,))
    pool = BlockPool(100, True, BLOCK)
    return UnseenManager(spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=BLOCK)


def request(name, ranges, tokens, plan=0, compact=False):
    return SimpleNamespace(
        request_id=name, sampling_params=SimpleNamespace(extra_args={NOTE: {"plan": plan, "compact": compact}}),
        mm_features=[feature("image", *each) for each in ranges], num_tokens=tokens, num_prompt_tokens=tokens,
        block_hashes=[b"%d" % index for index in range(tokens // BLOCK)], shared_prefix_boundary=0, lora_request=None,
        cache_salt=None,
    )  # fmt: skip


def asked(held, one, tokens, computed=()):
    """Blocks that the manager says it needs, and those that it then takes."""
    held.meet(one)
    number = held.get_num_blocks_to_allocate(one.request_id, tokens, computed, 0, 0, tokens)
    before = held.block_pool.get_num_free_blocks()
    added = held.allocate_new_blocks(one.request_id, tokens, tokens)
    assert before - held.block_pool.get_num_free_blocks() == number - len(computed)
    return number, [block.is_null for block in added]


def test_images_of_whole_blocks_take_none():
    """Text, 64 visual tokens from within a block on, text: in chunks, as they come."""
    held, one = manager(), request("a", [(5, 68)], 90)
    assert asked(held, one, 20) == (1, [False, True])
    assert asked(held, one, 60) == (0, [True, True])
    assert asked(held, one, 90) == (2, [False, False])
    assert len(held.req_to_blocks["a"]) == 6
    held.free("a")
    assert held.block_pool.get_num_free_blocks() == 99 and not held._rooms


def test_broken_images_take_what_their_text_fills():
    held, one = manager(), request("a", [(5, 67)], 90, compact=True)
    assert asked(held, one, 60) == (1, [False])
    assert asked(held, one, 90) == (1, [False])  # 5 + 22 tokens of text
    held.cache_blocks(one, 90, replay_boundaries=())
    assert all(block.block_hash is None for block in held.req_to_blocks["a"])


def test_requests_that_need_all_blocks():
    held = manager()
    assert asked(held, request("dense", [(5, 68)], 90, plan=1), 90) == (6, [False] * 6)
    assert asked(held, request("text", [], 90), 90) == (6, [False] * 6)


def test_prefixes_are_found_across_an_image_that_has_no_blocks():
    held, one = manager(), request("a", [(5, 68)], 90)
    asked(held, one, 90)
    held.cache_blocks(one, 90, replay_boundaries=())
    blocks = list(held.req_to_blocks["a"])
    held.free("a")
    again = request("b", [(5, 68)], 90)

    def found():
        return UnseenManager.find_longest_cache_hit(
            again.block_hashes, 89, [0], held.block_pool, held.kv_cache_spec, False, alignment_tokens=BLOCK
        )

    with held.looking_up(again):
        [hit], length = found()
    assert length == 80 and hit == blocks[:5] and [block.is_null for block in hit] == [False, True, True, True, False]
    assert found() == (([blocks[0]],), 16)  # without knowing whose they are
    held.add_local_computed_blocks("b", hit, 80, 0)
    held.meet(again)
    assert held.get_num_blocks_to_allocate("b", 90, (), 80, 80, 90) == 1
