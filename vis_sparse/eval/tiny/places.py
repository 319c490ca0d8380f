"""Where visual tokens lie in an image."""

import torch
from torch import Tensor


def raster(grid: tuple[int, int]) -> Tensor:
    """The middles of a grid's (height, width) tokens, row by row: (tokens, 2) fp32, (y, x) as shares of the image."""
    return torch.cartesian_prod(*((torch.arange(length) + 0.5) / length for length in grid))


def tiles(grid: tuple[int, int], side: int) -> Tensor:
    """`raster` of a grid that is cut into square tiles of `side` tokens, tile by tile."""
    rows, columns = (length // side for length in grid)
    middles = raster(grid).view(rows, side, columns, side, 2)
    return middles.transpose(1, 2).reshape(-1, 2)
