"""Where visual tokens lie in an image."""

import torch
from einops import rearrange
from torch import Tensor


def raster(grid: tuple[int, int]) -> Tensor:
    """The middles of a grid's (height, width) tokens, row by row: (tokens, 2) fp32, (y, x) as shares of the image."""
    return torch.cartesian_prod(*((torch.arange(length) + 0.5) / length for length in grid))


def tiles(grid: tuple[int, int], side: int) -> Tensor:
    """`raster` of a grid that is cut into square tiles of `side` tokens, tile by tile."""
    row_of_tiles = grid[1] // side
    cut = "(row y column x) middle -> (row column y x) middle"
    return rearrange(raster(grid), cut, y=side, x=side, column=row_of_tiles)
