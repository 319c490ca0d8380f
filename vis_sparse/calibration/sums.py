"""Running sums over samples, and the file in which they survive an interruption."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np

from ..plans.tensor_file import read_tensors, write_tensors
from .records import SampleError

_SAVE_SECONDS = 10.0
_SUM, _COUNT = "sum/", "count/"


class Sums:
    """Float64 sums of a profile's arrays over samples, in order, so that a run that goes on gives the same numbers.

    An array may be missing in some samples: its mean is over the others.

    partial: the file that is rewritten every few seconds, None for none. facts: what must be equal for a run to go on
    from it. keep: the array whose values of each sample are kept too (float32).
    """

    def __init__(self, partial: str | Path | None, facts: dict[str, str], keep: str):
        self._partial = None if partial is None else Path(partial)
        self._facts, self._keep, self._saved = facts, keep, time.monotonic()
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._kept: list[np.ndarray] = []
        self._digest, self._asked, self._resumed, self._resumed_digest = "", 0, 0, ""
        if self._partial is not None and self._partial.is_file():
            self._load()

    @property
    def done(self) -> int:
        return len(self._kept)

    def _load(self) -> None:
        try:
            tensors, metadata = read_tensors(self._partial)
            kept, digest = list(tensors.pop(self._keep)), metadata["digest"]
        except (ValueError, KeyError) as error:
            raise SampleError(
                f"partial: {self._partial}: expected what an interrupted run left ({error}); remove the file to start "
                "again"
            ) from None
        changed = sorted(name for name, value in self._facts.items() if metadata.get(name) != value)
        if changed:
            raise SampleError(
                f"partial: {self._partial} is of a run with another {', '.join(changed)}, expected the same run "
                "(remove the file to start again)"
            )
        self._kept = kept
        self._sums, self._counts = (
            {name.removeprefix(kind): array for name, array in tensors.items() if name.startswith(kind)}
            for kind in (_SUM, _COUNT)
        )
        self._resumed, self._resumed_digest = len(kept), digest

    def knows(self, index: int, sample: dict) -> bool:
        """Whether the sample was measured before an interruption. To be asked once for every sample, in order."""
        from .fingerprint import of_sample

        self._digest, self._asked = of_sample(sample, self._digest), index + 1
        if index + 1 == self._resumed and self._digest != self._resumed_digest:
            raise SampleError(
                f"partial: {self._partial} is of other samples, expected the same ones (remove the file to start again)"
            )
        return index < self._resumed

    def check_all_known(self) -> None:
        """Raise SampleError if the run that was interrupted had more samples than this one."""
        if self._asked < self._resumed:
            raise SampleError(
                f"partial: {self._partial} is of {self._resumed} samples at least, expected no more than the "
                f"{self._asked} of this run (remove the file to start again)"
            )

    def add(self, profile: dict[str, np.ndarray]) -> None:
        """Add the arrays of the sample that `knows` was asked about last."""
        self._kept.append(profile[self._keep].astype(np.float32))
        for name, value in profile.items():
            self._sums[name] = self._sums.get(name, 0) + value
            self._counts[name] = self._counts.get(name, np.zeros((), dtype=np.int64)) + 1
        if self._partial is not None and time.monotonic() - self._saved >= _SAVE_SECONDS:
            write_tensors(self._partial, self._tensors(), self._facts | {"digest": self._digest})
            self._saved = time.monotonic()

    def _tensors(self) -> dict[str, np.ndarray]:
        sums = {_SUM + name: total for name, total in self._sums.items()}
        counts = {_COUNT + name: np.asarray(count) for name, count in self._counts.items()}
        return sums | counts | {self._keep: self.kept}

    @classmethod
    def merged(cls, parts: list[Sums]) -> Sums:
        """The sums of a run whose sample i is in `parts[i % len(parts)]`."""
        if len(parts) == 1:
            return parts[0]
        merged = cls(None, {}, parts[0]._keep)
        for part in parts:
            for name, total in part._sums.items():
                merged._sums[name] = merged._sums.get(name, 0) + total
                merged._counts[name] = merged._counts.get(name, 0) + part._counts[name]
        rounds = itertools.zip_longest(*(part._kept for part in parts))
        merged._kept = [kept for turn in rounds for kept in turn if kept is not None]
        return merged

    @property
    def kept(self) -> np.ndarray:
        """(samples, ...) float32 values of the kept array."""
        return np.stack(self._kept)

    def means(self) -> dict[str, np.ndarray]:
        """float32 means over the samples, by name."""
        return {name: (total / self._counts[name]).astype(np.float32) for name, total in self._sums.items()}

    def forget(self) -> None:
        """Remove the partial file: its run is complete and its result is safe."""
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)
