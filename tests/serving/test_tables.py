"""Layouts A and B on a simulated paged cache: every query of every step reads exactly the keys that its plan says,
whatever the block size, the borders of chunks, the shared prefixes, the images and the plans beside it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vis_sparse.serving.kinds import ALL, READ, TEXT
from vis_sparse.serving.step import FAR, Batch, Step, merged_segments
from vis_sparse.serving.tables import (
    block_columns,
    blocks_not_held,
    compact_slots,
    empty_columns,
    fits_blocks,
    head_copies,
    text_tokens,
)

from .paged import Cache, Request, layout_of

KINDS = [(TEXT, ALL), (READ, ALL), (TEXT, READ), (ALL, TEXT)]


@st.composite
def workloads(draw):
    block = draw(st.sampled_from([2, 4, 8]))
    whole = draw(st.booleans())  # images of whole blocks: layout B
    pieces = st.lists(
        st.tuples(st.integers(0, 5), (st.integers(1, 3).map(lambda n: n * block) if whole else st.integers(1, 9))),
        min_size=0,
        max_size=4,
    )
    prompts = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = []
        for text, visual in draw(pieces):
            prompt += [1] * text + [-1] * visual
        prompts.append(tuple(prompt))
    requests = []
    for index in range(draw(st.integers(1, 5))):
        tail = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2 * block))
        tokens = draw(st.sampled_from(prompts)) + tuple(tail)
        requests.append(layout_of(Request(tokens, draw(st.integers(0, 1))), block, index))
    return block, draw(st.sampled_from(KINDS)), requests, draw(st.integers(0, 2**32 - 1))


@given(workloads())
@settings(max_examples=150)
def test_every_query_reads_its_keys(workload):
    block, kinds, requests, seed = workload
    random = np.random.default_rng(seed)
    cache = Cache(block, kinds)
    waiting, running = list(requests), []
    while waiting or running:
        if waiting and (not running or random.random() < 0.5):
            running.append(waiting.pop(0))
            cache.admit(running[-1])
        if running[1:] and random.random() < 0.1:  # preempted: its blocks are lost, it starts again
            waiting.append(running.pop())
        chosen = [request for request in running if random.random() < 0.8] or running[:1]
        counts = [int(random.integers(1, min(len(r.tokens) - r.done, 2 * block + 1) + 1)) for r in chosen]
        cache.step(chosen, counts)
        running = [request for request in running if request.done < len(request.tokens)]


def test_the_simulation_sees_a_wrong_layout():
    """Layout A with shared prefixes: another suffix is written over the first one's, in the block that they share."""
    block, image = 4, (-1,) * 4
    first = Request((1, 1) + image + (2, 2, 2, 2), 0, compact=True)
    second = Request((1, 1) + image + (3, 3, 3), 0, compact=True)
    cache = Cache(block, (TEXT,))
    cache.admit(first)
    cache.step([first], [9])
    cache.admit(second)
    assert second.done == 4
    cache.step([second], [5])
    with pytest.raises(AssertionError):
        cache.step([first], [1])


def test_an_image_of_broken_blocks_does_not_fit_layout_b():
    assert fits_blocks([(3, 8), (20, 4)], 4) and not fits_blocks([(3, 8), (20, 5)], 4)
    request = Request((1, 1) + (-1,) * 5 + (2, 2, 2), 0)
    cache = Cache(4, (TEXT,))
    cache.admit(request)
    with pytest.raises(AssertionError):
        cache.step([request], [10])


def test_segments_that_touch_are_one():
    assert merged_segments([(8, 9), (2, 4), (5, 6)]) == [(2, 5), (8, 2)]
    assert merged_segments([]) == []


def test_a_decode_step_needs_no_row_of_its_own():
    """All requests past their images: one query each, and the tables skip the images' blocks."""
    batch = Batch.of([[(2, 8)], [], [(4, 4), (9, 8)]], [0, 0, 0], [False] * 3)
    step = Step(batch, np.arange(4), np.array([12, 5, 20]))
    assert not step.has_visual
    sequences = step.sequences((TEXT,))
    assert sequences.rows is None and sequences.keys.tolist() == [4, 5, 8]
    assert sequences.query_start.tolist() == [0, 1, 2, 3]
    columns = block_columns(batch, sequences, 4, 5)
    assert columns[0, :1].tolist() == [2] and columns[1, :2].tolist() == [0, 1]
    assert columns[2, :2].tolist() == [0, 4]  # 4 text, the image's block out, then 1 + 3 around the second image
    assert head_copies(step, (TEXT,), 4) == [] and compact_slots(step, (TEXT,), None, 4) is None


def test_what_a_layer_without_visual_keys_has_no_room_for():
    assert empty_columns([(2, 8)], 4) == [1] and empty_columns([(4, 4), (9, 8)], 4) == [1, 3]
    assert blocks_not_held([(4, 4), (9, 8)], 20, 4, compact=False) == 2
    assert blocks_not_held([(2, 7)], 20, 4, compact=True) == 1 and blocks_not_held([], 20, 4, compact=True) == 0
    assert empty_columns([(0, 8)], 4) == [0, 1] and empty_columns([(1, 4)], 4) == [] and empty_columns([], 4) == []
    assert [text_tokens([(2, 3), (6, 2)], count) for count in range(10)] == [0, 1, 2, 2, 2, 2, 3, 3, 3, 4]


def test_padding_requests_have_no_segments():
    batch = Batch.of([[], [(1, 2)]], [0, 0], [False, False])
    assert batch.starts[0].tolist() == [FAR] and batch.lengths[0].tolist() == [0]
    empty = Step(Batch.of([], [], []), np.array([0]), np.array([], int))
    assert empty.num_rows == 0 and not empty.has_visual
