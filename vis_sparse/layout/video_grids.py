"""From a video's frames to the grids of its visual tokens, and to what the vision tower runs for it.

As in `image_grids`, one class a rule with one method, `encode(frames, height, width)`: frames after sampling, their
size in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .image_grids import EncodedImage, ShapeError, smart_resize


@dataclass(frozen=True, slots=True)
class FixedFrames:
    """Every frame is resized to one square (InternVL, LLaVA-NeXT-Video, LLaVA-OneVision).

    patches: of a frame in the vision tower, a square. projected: of its rows, those that pass through the projector.
    grid: (height, width) of a frame in tokens. is_joined: all frames are one segment, else each is its own. newline: a
    token after the last frame.
    """

    patches: int
    projected: int
    grid: tuple[int, int]
    is_joined: bool
    newline: bool = False

    def encode(self, frames: int, height: int, width: int) -> EncodedImage:
        grids = ((frames, *self.grid),) if self.is_joined else ((1, *self.grid),) * frames
        newline = ((1, 1, 1),) if self.newline else ()
        side = math.isqrt(self.patches)
        return EncodedImage(grids + newline, ((side, side),) * frames, self.projected * frames)


@dataclass(frozen=True, slots=True)
class ResizedFrames:
    """Qwen2-VL: `temporal` frames a patch, the area of each frame kept within bounds; one segment.

    The last frame is repeated to fill a patch.
    """

    patch: int
    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int

    def encode(self, frames: int, height: int, width: int) -> EncodedImage:
        rows, columns = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        steps, patches = math.ceil(frames / self.temporal), (rows * self.merge, columns * self.merge)
        return EncodedImage(((steps, rows, columns),), (patches,) * steps, rows * columns * steps)


@dataclass(frozen=True, slots=True)
class ResizedVideo(ResizedFrames):
    """Qwen3-VL: as ResizedFrames, but bounds hold for the pixels of all frames, and each patch's time is a segment."""

    def encode(self, frames: int, height: int, width: int) -> EncodedImage:
        if frames < self.temporal:
            raise ShapeError(f"video_frames: got {frames}, expected at least the {self.temporal} of a patch")
        unit = self.patch * self.merge
        if min(height, width) < unit:
            scale = max(unit / height, unit / width)
            height, width = int(height * scale), int(width * scale)
        counted = round(frames / self.temporal) * self.temporal
        rows, columns = smart_resize(height, width, unit, self.min_pixels, self.max_pixels, frames, counted)
        steps, patches = math.ceil(frames / self.temporal), (rows * self.merge, columns * self.merge)
        return EncodedImage(((1, rows, columns),) * steps, (patches,) * steps, rows * columns * steps)


VIDEO_RULES = {"fixed": FixedFrames, "resize-frames": ResizedFrames, "resize-video": ResizedVideo}
VideoRule = FixedFrames | ResizedFrames | ResizedVideo
