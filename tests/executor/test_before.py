"""Which visual tokens come into the decoder: every order against a plain reading of what it says, in float64."""

import itertools

import numpy as np
import pytest
import torch

from vis_sparse.executor.before_scores import change, distinct, relevance, token_patches
from vis_sparse.executor.token_scores import received_by_all
from vis_sparse.executor.tokens import entering
from vis_sparse.executor.tower_tables import TowerRows
from vis_sparse.layout.layout import VisualLayout
from vis_sparse.layout.packing import visual_coordinates
from vis_sparse.plans.before import TokensBefore

from ..marks import slow_but

# a picture, a video of three frames, a newline token; a picture alone
LAYOUT = VisualLayout.from_grids([[(1, (1, 2, 3)), (9, (3, 2, 2)), (21, (1, 1, 1))], [(0, (1, 4, 4))]])
VISUAL = visual_coordinates(LAYOUT)
SEGMENTS = [range(0, 6), range(6, 18), range(18, 19), range(19, 35)]
SEEDS = slow_but([0, 1], range(8))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("by", ["received", "relevance"])
def test_every_segment_keeps_its_share_of_highest_scores(by, keep):
    scores = np.round(np.random.default_rng(0).random(35), 1)  # some are equal: the first ones stay
    before = TokensBefore(by, keep)
    expected = []
    for rows in SEGMENTS:
        count = max(1, int(keep * len(rows) + 1e-6))
        expected += sorted(sorted(rows, key=lambda row: (-scores[row], row))[:count])
    assert entering(before, VISUAL, scores).tolist() == expected
    assert len(entering(before, VISUAL)) == len(expected), "what is counted"


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.7])
def test_by_change_the_first_frame_stays_and_then_what_differs_most(keep):
    rows = random(35, 6)
    expected = {*SEGMENTS[0], *SEGMENTS[2], *SEGMENTS[3], *range(6, 10)}
    differs = {row: 1 - torch.cosine_similarity(rows[row], rows[row - 4], dim=0).item() for row in range(10, 18)}
    for row in sorted(differs, key=lambda row: -differs[row])[: max(0, int(12 * keep + 1e-6) - 4)]:
        expected.add(row)
    before = TokensBefore("change", keep)
    assert entering(before, VISUAL, change(rows, VISUAL).numpy()).tolist() == sorted(expected)
    assert len(entering(before, VISUAL)) == len(expected)


def test_stride_looks_at_places_alone():
    # the first of 2 rows of 3, every second column of 2 x 2 and of 4 x 4
    kept = entering(TokensBefore("stride", 0.5), VISUAL)
    assert kept.tolist() == [0, 1, 2, 6, 8, 10, 12, 14, 16, 18, *range(19, 35, 2)]


@pytest.mark.parametrize("duplicates", [0, 0.25, 0.9])
def test_how_many_are_duplicates_is_told(duplicates):
    counts = [max(1, int((1 - duplicates) * len(rows) + 1e-6)) for rows in SEGMENTS]
    assert len(entering(TokensBefore("duplicate"), VISUAL, duplicates=duplicates)) == sum(counts)


@pytest.mark.parametrize("seed", SEEDS)
def test_relevance_takes_what_adds_most_to_the_determinant(seed):
    """Each step by the determinants of all candidates' kernels, in the open."""
    rows, text, count = random(9, 12, seed=seed), random(4, 12, seed=seed + 50), 6
    unit = rows / rows.norm(dim=1, keepdim=True)
    near = torch.stack([torch.cosine_similarity(row[None], text).mean() for row in rows])
    near = (near - near.min() + 1e-6) / (near.max() - near.min() + 1e-6)
    kernel = near[:, None] * (unit @ unit.T) * near
    taken: list[int] = []
    for _ in range(count):
        left = [row for row in range(9) if row not in taken]
        taken.append(max(left, key=lambda row: torch.linalg.det(kernel[[*taken, row]][:, [*taken, row]]).item()))
    scores = relevance(rows, text, count)
    assert scores.argsort(descending=True)[:count].tolist() == taken
    assert (scores > 0).sum() == count


def test_relevance_goes_on_by_text_where_nothing_new_is_left():
    """Rows of a plane: two span it; equal rows add nothing."""
    rows = torch.tensor([[1, 0.0], [1, 0.1], [1, 0.1], [0.2, 1], [0.9, 0.3], [-1, 0.4]], dtype=torch.float64)
    text = torch.tensor([[1, 0.05]], dtype=torch.float64)
    scores = relevance(rows, text, 6)
    order = scores.argsort(descending=True).tolist()
    near = torch.cosine_similarity(rows, text)
    assert set(order[:2]) != {1, 2}
    assert order[2:] == sorted(order[2:], key=lambda row: (-near[row].item(), row))


@pytest.mark.parametrize(("queries", "parts"), [(1, 2), (7, 3), (600, 1)])
def test_attention_received_is_the_mean_column_of_the_matrix(queries, parts):
    query, key = random(parts, queries, 2, 4), random(parts, 7, 2, 4, seed=1)
    scores = torch.einsum("pqhd,pkhd->phqk", query, key) * 0.5
    torch.testing.assert_close(received_by_all(query, key, 0.5), scores.softmax(-1).mean((1, 2)), rtol=1e-12, atol=0)


def rows_of(grids, merge=1, globals_=0, windows=None):
    places = [
        (image, *place)
        for image, (height, width) in enumerate(grids)
        for place in [(-1, -1)] * globals_ + list(itertools.product(range(height), range(width)))
    ]
    order = np.random.default_rng(0).permutation(len(places))  # a model may have any order of its own
    return TowerRows(*np.array(places)[order].T)


@pytest.mark.parametrize(("merge", "globals_"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_patches_of_a_token(merge, globals_):
    rows = rows_of([(4, 6), (2, 4)], merge, globals_)
    found = token_patches(rows, merge)
    expected = [
        (image, y, x)
        for image, height, width in ((0, 4, 6), (1, 2, 4))
        for y in range(height // merge)
        for x in range(width // merge)
    ]
    assert len(found) == len(expected)
    for (image, y, x), patches in zip(expected, found):
        assert {*zip(rows.y[patches], rows.x[patches])} == {
            (merge * y + down, merge * x + across) for down in range(merge) for across in range(merge)
        }
        assert {*rows.sequence[patches]} == {image}


@pytest.mark.parametrize("tolerance", [0, 0.5])
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_token_leaves_if_it_equals_those_to_the_left_and_above(seed, merge, tolerance):
    grids = [(5, 7), (1, 4), (3, 1), (4, 4)]
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 2, (*grid, 3)) * (0.3 if tolerance else 1.0) for grid in grids]
    for image in images:
        image[1:, 1:] = np.where(rng.random((*image[1:, 1:].shape[:2], 1)) < 0.8, 1.0, image[1:, 1:])
    expected = []
    for image in images:
        for y, x in np.ndindex(*image.shape[:2]):
            near = [image[y, x - 1], image[y - 1, x]] if y and x else []
            expected.append(not near or any(np.abs(image[y, x] - other).max() > tolerance for other in near))
    rows = rows_of([(merge * height, merge * width) for height, width in grids])
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in images]))
    stays = distinct(pixels, rows, token_patches(rows, merge), merge, tolerance)
    assert stays.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_what_is_no_number_stays():
    pixels = torch.full((4, 2), torch.nan)
    rows = rows_of([(2, 2)])
    assert distinct(pixels, rows, token_patches(rows, 1), 1, 1.0).all()
