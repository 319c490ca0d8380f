"""Points of a search, and their Pareto front in a folder: `front.csv`, and one plan file a point."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..plans.plan import VisualPlan


@dataclass(frozen=True)
class Point:
    """A plan, its cost as a share of the dense model's, and what was measured on the samples.

    kl: KL(dense || plan) of the answers' tokens in nats, mean over samples. accuracy: share of the samples whose whole
    answer is the likeliest.
    """

    plan: VisualPlan
    cost: float
    kl: float
    accuracy: float


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no cheaper or equally cheap one beats in KL, dearest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.kl)):
        if not front or point.kl < front[-1].kl:
            front.append(point)
    return front[::-1]


def write_front(folder: Path, points: Iterable[Point], cost: str) -> None:
    """Write `front.csv` (file, cost share, KL, accuracy) and the plans of the front into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "front.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["plan", f"{cost}_share", "kl", "accuracy"])
        for index, point in enumerate(pareto(points)):
            name = f"plan-{index:03}.yaml"
            (folder / name).write_text(described(point, cost).to_yaml())
            table.writerow([name, f"{point.cost:.6f}", f"{point.kl:.6g}", f"{point.accuracy:.4f}"])


def described(point: Point, cost: str):
    """The point's plan, whose `about` says what it costs."""
    found = f"{point.cost:.1%} of dense ({cost}), KL {point.kl:.3g} on the samples."
    return point.plan.replace(name="searched", about=f"{point.plan.about} {found}")
