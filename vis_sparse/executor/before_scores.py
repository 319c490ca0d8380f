"""The scores by which visual tokens come into the decoder or leave before it: one number a token.

Similarities are cosines in fp32 at least, over rows without their gradients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

from ..layout.packing import Coordinates
from .token_scores import wide
from .tower_tables import TowerRows

_NOTHING_NEW = 1e-6  # of a token's squared length of at most 1: what lies within the span of those already taken


def change(rows: torch.Tensor, visual: Coordinates) -> torch.Tensor:
    """(rows,) 1 - the cosine to the row in the same place one frame before; 0 in a segment's first frame.

    rows: (rows, hidden), segment after segment in raster order.
    """
    later = np.flatnonzero(visual.frame > 0)
    earlier = later - (visual.height * visual.width)[later]
    unit = normalize(rows.to(wide(rows.dtype)), dim=-1)
    index = torch.from_numpy(np.stack([later, earlier])).to(rows.device)
    return unit.new_zeros(len(rows)).index_copy(0, index[0], 1 - (unit[index[0]] * unit[index[1]]).sum(-1))


def relevance(rows: torch.Tensor, text: torch.Tensor, count: int) -> torch.Tensor:
    """Scores of one segment's rows, (rows,): those taken first have the highest; of those not taken all are 0.

    rows: (rows, hidden), text: (tokens, hidden). Greedy MAP inference of a determinantal point process whose kernel is
    r_i s_ij r_j: s the cosine of two rows, r the mean cosine to the text, scaled to [0, 1] within the segment (arXiv
    2506.10967, and 1709.05135 for the inference). Once what is left lies in the span of what was taken, the most
    relevant come first.
    """
    unit, words = (normalize(t.to(wide(t.dtype)), dim=-1) for t in (rows, text))
    near = unit @ words.mean(0)
    low, high = near.min(), near.max()
    near = (near - low + _NOTHING_NEW) / (high - low + _NOTHING_NEW)
    scaled = unit * near[:, None]
    kernel = scaled @ scaled.T
    # what of each row lies outside the span of those taken, squared; and the directions of those, by row
    rest, spans = kernel.diagonal().clone(), unit.new_zeros(count, len(rows))
    scores, open_ = torch.zeros_like(rest), torch.ones_like(rest, dtype=torch.bool)
    for step in range(count):
        is_new = rest > _NOTHING_NEW
        rank = torch.where(is_new, 2 + rest, near).masked_fill(~open_, -1)
        best = rank.argmax(0, keepdim=True)
        along = kernel.index_select(0, best)[0] - spans[:step].T @ spans[:step].index_select(1, best)[:, 0]
        along = along * is_new[best] / rest[best].clamp_min(_NOTHING_NEW).sqrt()
        spans[step] = along
        rest = rest - along.square()
        open_ = open_.index_fill(0, best, False)
        scores = scores.index_fill(0, best, count - step)
    return scores


def token_patches(rows: TowerRows, merge: int) -> np.ndarray:
    """(tokens, merge^2) rows of an encoder's call that become each token: image after image, in raster order."""
    patches = np.flatnonzero(rows.y >= 0)
    y, x = rows.y[patches], rows.x[patches]
    order = np.lexsort((x, y, x // merge, y // merge, rows.sequence[patches]))
    return patches[order].reshape(-1, merge**2)


def distinct(pixels: torch.Tensor, rows: TowerRows, patches: np.ndarray, merge: int, tolerance: float) -> np.ndarray:
    """(tokens,) bool: tokens whose pixels are not those of the token to the left and of the one above, or that have no
    such two. The others lie inside an area of which its upper and left rim stay.

    pixels: (tokens, values); they are the same if no value differs by more than `tolerance`. patches: `token_patches`
    of the rows.
    """
    first = patches[:, 0]
    image, y, x = rows.sequence[first], rows.y[first] // merge, rows.x[first] // merge
    width = np.zeros(image.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(width, image, x + 1)
    inside = np.flatnonzero((y > 0) & (x > 0))
    three = inside, inside - 1, inside - width[image[inside]]
    own, left, above = (pixels[torch.from_numpy(index).to(pixels.device)] for index in three)
    alike = ((own - left).abs().amax(-1) <= tolerance) & ((own - above).abs().amax(-1) <= tolerance)
    stays = np.ones(len(first), dtype=bool)
    stays[inside[alike.cpu().numpy()]] = False
    return stays
