"""From an image's size to the grids of its visual tokens, and to what the vision tower runs for it.

One class a rule, holding the rule's settings (they come from a shape file or a model's config). Sizes are pixels,
(height, width) as in transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

Grid = tuple[int, int, int]


class ShapeError(ValueError):
    """A model shape that is unknown, malformed, or lacks what a count needs; or an image it cannot take."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """What one image or video becomes.

    grids: (frames, height, width) in tokens of each segment, in sequence order. sequences: (height, width) in patches
    of each sequence that the vision tower attends within. projected: rows that pass through the projector.
    """

    grids: tuple[Grid, ...]
    sequences: tuple[tuple[int, int], ...]
    projected: int


class ImageRule:
    """What the images of one sample become."""

    __slots__ = ()

    def encode(self, height: int, width: int) -> EncodedImage:
        """One image alone in its sample."""
        raise NotImplementedError

    def encode_several(self, images: int, height: int, width: int) -> tuple[EncodedImage, ...]:
        """`images` images, all of one size."""
        return (self.encode(height, width),) * images


@dataclass(frozen=True, slots=True)
class FixedGrid(ImageRule):
    """Every image is resized to one square (LLaVA-1.5). grid: (height, width) in tokens."""

    grid: tuple[int, int]
    default_size: tuple[int, int] = (336, 336)

    def encode(self, height: int, width: int) -> EncodedImage:
        size = self.grid[0] * self.grid[1]
        return EncodedImage(((1, *self.grid),), (self.grid,), size)


@dataclass(frozen=True, slots=True)
class AnyRes(ImageRule):
    """LLaVA-NeXT: a base view, then tiles put together to one grid, its padding cut off, a newline token a row.

    tile: side of a tile in pixels. grid: (height, width) of a tile in tokens. pinpoints: (height, width) in pixels to
    choose from.
    """

    tile: int
    grid: tuple[int, int]
    pinpoints: tuple[tuple[int, int], ...]
    default_size: tuple[int, int]

    def encode(self, height: int, width: int) -> EncodedImage:
        best = self.best_pinpoint(height, width)
        down, across = best[0] // self.tile, best[1] // self.tile
        rows, columns = self._unpadded(down * self.grid[0], across * self.grid[1], height, width)
        size = self.grid[0] * self.grid[1]
        tiles = 1 + down * across
        return EncodedImage(((1, *self.grid), (1, rows, columns + 1)), (self.grid,) * tiles, size * tiles)

    def best_pinpoint(self, height: int, width: int) -> tuple[int, int]:
        """The pinpoint that keeps most of the image's pixels, and wastes least among those."""

        def merit(pinpoint):
            scale = min(pinpoint[0] / height, pinpoint[1] / width)
            kept = min(int(height * scale) * int(width * scale), height * width)
            return kept, kept - pinpoint[0] * pinpoint[1]

        return max(self.pinpoints, key=merit)

    @staticmethod
    def _unpadded(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
        # the same amount is cut on both sides, so an odd remainder leaves one padded row or column in place
        if width / height > columns / rows:
            return rows - 2 * ((rows - int(round(height * (columns / width), 7))) // 2), columns
        return rows, columns - 2 * ((columns - int(round(width * (rows / height), 7))) // 2)


@dataclass(frozen=True, slots=True)
class OneVision(AnyRes):
    """LLaVA-OneVision: as AnyRes, but the tiles' grid shrinks to what `max_tiles` tiles hold, if it is well above it.

    An image that is not the only one of its sample is its base view alone, with one newline token.
    """

    max_tiles: int

    def encode(self, height: int, width: int) -> EncodedImage:
        encoded = AnyRes.encode(self, height, width)
        base, (_, rows, columns) = encoded.grids
        ratio = math.sqrt(rows * (columns - 1) / (self.max_tiles * self.grid[0] * self.grid[1]))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int((columns - 1) // ratio) + 1
        return replace(encoded, grids=(base, (1, rows, columns)))

    def encode_several(self, images: int, height: int, width: int) -> tuple[EncodedImage, ...]:
        return (self.encode(height, width) if images == 1 else self.encode_one_of_several(),) * images

    def encode_one_of_several(self) -> EncodedImage:
        size = self.grid[0] * self.grid[1]
        return EncodedImage(((1, *self.grid), (1, 1, 1)), (self.grid,), size)


def smart_resize(
    height: int, width: int, unit: int, min_pixels: int, max_pixels: int, frames: int = 1, counted: int = 1
) -> tuple[int, int]:
    """Sides in units of `unit` pixels, the nearest that keep the pixels of `frames` frames within bounds.

    counted: frames by which the rounded sides are held against the bounds.
    """
    if max(height, width) > 200 * min(height, width):
        raise ShapeError(f"image size: got {width} x {height} pixels, expected an aspect ratio of at most 200")
    rows, columns = (round(side / unit) for side in (height, width))
    pixels = counted * rows * columns * unit**2
    if pixels > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return rows, columns


@dataclass(frozen=True, slots=True)
class SmartResize(ImageRule):
    """Qwen2-VL: sides rounded to whole merged patches, the area kept within bounds. patch: pixels; merge: patches."""

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int
    default_size: tuple[int, int]

    def encode(self, height: int, width: int) -> EncodedImage:
        rows, columns = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        patches = rows * self.merge, columns * self.merge
        return EncodedImage(((1, rows, columns),), (patches,), rows * columns)


@dataclass(frozen=True, slots=True)
class Tiles(ImageRule):
    """InternVL: up to `max_tiles` square tiles in the arrangement nearest the image's shape, then a thumbnail."""

    tile: int
    patch: int
    merge: int
    max_tiles: int
    thumbnail: bool
    default_size: tuple[int, int]

    def encode(self, height: int, width: int) -> EncodedImage:
        rows, columns = self.arrangement(height, width)
        tiles = rows * columns
        if self.thumbnail and tiles > 1:
            tiles += 1
        side = self.tile // self.patch
        merged = side // self.merge
        return EncodedImage(((1, merged, merged),) * tiles, ((side, side),) * tiles, tiles * merged**2)

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of tiles. Of equally near shapes, more tiles only where the image has the pixels for them."""
        sides = range(1, self.max_tiles + 1)
        choices = [(across, down) for across in sides for down in sides if across * down <= self.max_tiles]
        best, nearest = (1, 1), math.inf
        for across, down in sorted(choices, key=math.prod):
            distance = abs(width / height - across / down)
            roomy = 2 * height * width > self.tile**2 * down * across
            if distance < nearest or (distance == nearest and roomy):
                best, nearest = (down, across), distance
        return best


IMAGE_RULES = {"fixed": FixedGrid, "anyres": AnyRes, "onevision": OneVision, "resize": SmartResize, "tiles": Tiles}
