"""Which plans are worth their FLOPs."""

from __future__ import annotations


def pareto_front(points: list[dict]) -> list[dict]:
    """The points that no other beats: by FLOPs upwards, each better than all that are cheaper."""
    sign = -1 if points[0]["higher_is_better"] is False else 1
    best, kept = float("-inf"), []
    for point in sorted(points, key=lambda p: (p["gflops"], -sign * p["value"])):
        if sign * point["value"] > best:
            best = sign * point["value"]
            kept.append(point)
    return kept
