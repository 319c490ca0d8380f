"""Which visual tokens come into the decoder at all: data and checks, as a plan's `before` says it."""

from __future__ import annotations

from dataclasses import dataclass

from .layer_plan import PlanError, brief, is_number

ORDERS = ("duplicate", "change", "received", "relevance", "stride")
OF_THE_TOWER = ("duplicate", "received")  # what only the vision tower's call can tell


@dataclass(frozen=True, slots=True)
class TokensBefore:
    """The visual tokens that come into the decoder; the others enter no layer of it. Positions stay true.

    keep: share in (0, 1] of each segment (image, tile or video) that stays, `count` tokens; None by duplicate.

    by: "received", the largest attention received in the last layer of the vision tower that runs, from its class token
    or, without one, from all patches, mean over heads and over the patches of a token (VisionZip's order). "relevance",
    those that a determinantal point process takes first, of which similarity among themselves repels and similarity to
    the prompt's text attracts (CDPruner's). "change", of each video, its first frame and then the tokens that differ
    most from those in their places one frame before (EVS's); images stay whole. "stride", whole rows and columns of
    each grid at regular steps. "duplicate", tokens whose pixels all lie within `tolerance` (in units of what the tower
    is given) of those of the token to the left, and of those of the one above, leave before the tower; pixels decide
    how many.
    """

    by: str
    keep: float | None = None
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.by not in ORDERS:
            raise PlanError(f"before.by: got {brief(self.by)}, expected one of {', '.join(ORDERS)}")
        if not is_number(self.tolerance) or not 0 <= self.tolerance < float("inf"):
            raise PlanError(f"before.tolerance: got {brief(self.tolerance)}, expected a number >= 0")
        object.__setattr__(self, "tolerance", float(self.tolerance))
        if self.by == "duplicate":
            if self.keep is not None:
                raise PlanError(f"before.keep: got {brief(self.keep)} by duplicate, expected none (pixels decide)")
            return
        if self.tolerance:
            raise PlanError(f"before.tolerance: got {self.tolerance} by {self.by}, expected none (by duplicate alone)")
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise PlanError(f"before.keep: got {brief(self.keep)} by {self.by}, expected a share in (0, 1]")
        object.__setattr__(self, "keep", float(self.keep))

    @property
    def needs_tower(self) -> bool:
        """Whether the vision tower has to run under the plan."""
        return self.by in OF_THE_TOWER

    @property
    def reads_text(self) -> bool:
        """Whether the prompt's text decides."""
        return self.by == "relevance"

    def count(self, num_tokens: int) -> int:
        """Number of tokens kept of a segment of `num_tokens`: rounded down, but at least 1 of any."""
        return min(num_tokens, max(1, int(num_tokens * self.keep + 1e-6)))

    def to_data(self) -> dict[str, str | float]:
        """As a file holds it."""
        if self.keep is None:
            return {"by": self.by, "tolerance": self.tolerance}
        return {"keep": self.keep, "by": self.by}
