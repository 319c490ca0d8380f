"""Layout: where the visual tokens of a batch lie, and which grid each belongs to.

A segment is one raster grid (an image tile, or one video) at consecutive positions of one sample. Newline tokens of
AnyRes grids are a last column of the grid. Positions count columns of the padded batch, from the start of the
sequence: with a KV cache, columns of earlier calls count too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


class LayoutError(ValueError):
    """A layout that is malformed, or does not fit the call it is used with."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One grid of visual tokens: sample, first position, and (frames, height, width) in tokens.

    modality: the encoder's word for what it shows; two layouts are the same whatever it says.
    """

    sample: int
    start: int
    frames: int
    height: int
    width: int
    modality: str = field(default="image", compare=False)

    @property
    def size(self) -> int:
        return self.frames * self.height * self.width

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class VisualLayout:
    """The segments of a batch, ordered by sample and position. Immutable and hashable: caches are keyed on it."""

    batch_size: int
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        previous = None
        for segment in self.segments:
            if not 0 <= segment.sample < self.batch_size:
                raise LayoutError(f"segment: got sample {segment.sample}, expected 0 to {self.batch_size - 1}")
            if min(segment.frames, segment.height, segment.width) < 1 or segment.start < 0:
                raise LayoutError(f"segment: got {segment}, expected a start >= 0 and a grid of sides >= 1")
            if previous and previous.sample > segment.sample:
                raise LayoutError("segments: expected order by sample and position")
            if previous and previous.sample == segment.sample and previous.end > segment.start:
                raise LayoutError(
                    f"segments: sample {segment.sample}: got positions {segment.start} to {segment.end - 1}, "
                    f"expected a start at or after {previous.end} (segments must not overlap)"
                )
            previous = segment

    @classmethod
    def from_grids(
        cls, samples: Sequence[Sequence[tuple[int, tuple[int, int, int]] | tuple[int, tuple[int, int, int], str]]]
    ) -> VisualLayout:
        """From, per sample, (first position, (frames, height, width)) of each segment, and its modality or not."""
        segments = [
            Segment(index, int(start), *(int(side) for side in grid), *modality)
            for index, sample in enumerate(samples)
            for start, grid, *modality in sorted(sample)
        ]
        return cls(len(samples), tuple(segments))

    @property
    def num_visual(self) -> int:
        return sum(segment.size for segment in self.segments)

    def window(self, start: int, end: int) -> VisualLayout:
        """The segments inside positions [start, end), positions kept. A segment cut by either edge is refused."""
        inside = []
        for segment in self.segments:
            if segment.end <= start or segment.start >= end:
                continue
            if segment.start < start or segment.end > end:
                raise LayoutError(
                    f"prefill chunk: got positions {start} to {end - 1}, which cut the {segment.frames}x"
                    f"{segment.height}x{segment.width} visual segment at {segment.start} to {segment.end - 1} of "
                    f"sample {segment.sample}; expected chunks that end outside visual segments"
                )
            inside.append(segment)
        return VisualLayout(self.batch_size, tuple(inside))

    def before(self, end: int) -> VisualLayout:
        """The segments that start before position `end`."""
        return VisualLayout(self.batch_size, tuple(s for s in self.segments if s.start < end))

    def shifted(self, offset: int) -> VisualLayout:
        """The same layout with `offset` added to every position (a later turn of a conversation)."""
        moved = (replace(s, start=s.start + offset) for s in self.segments)
        return VisualLayout(self.batch_size, tuple(moved))

    def expanded(self, batch_size: int) -> VisualLayout:
        """The layout with each sample repeated consecutively to fill `batch_size` (beams, several answers)."""
        if batch_size % self.batch_size:
            raise LayoutError(f"layout: got a batch of {batch_size}, expected a multiple of {self.batch_size}")
        times = batch_size // self.batch_size
        repeated = (
            replace(s, sample=s.sample * times + k)
            for sample in range(self.batch_size)
            for k in range(times)
            for s in self.segments
            if s.sample == sample
        )
        return VisualLayout(batch_size, tuple(repeated))
