"""What oneDNN's matrix product costs beside `linear`, by size: `python -m vis_sparse.eval.bench_products`.

The table that `executor/weights.py` chooses by. fp32, one thread, process time, the two in turns; medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

ROWS = (1, 4, 16, 64, 128, 256, 577)
WEIGHTS = ((64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024), (2048, 2048), (4096, 4096))
_ROUND = 0.02  # seconds of a measurement, about


@torch.no_grad()
def ratio(rows: int, inputs: int, outputs: int, rounds: int) -> tuple[float, float]:
    """(microseconds of `linear`, oneDNN's time over it) of x (rows, inputs) times a weight (outputs, inputs)."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    one_dnn = torch.ops.mkldnn._linear_pointwise
    ways = (lambda: F.linear(x, weight), lambda: one_dnn(x, weight, None, "none", [], ""))
    calls = max(3, int(_ROUND / _seconds(ways[0], 3)))
    times = [[_seconds(way, calls) for way in ways] for _ in range(rounds)]
    return 1e6 * statistics.median(own for own, _ in times), statistics.median(other / own for own, other in times)


def _seconds(call: Callable[[], object], calls: int) -> float:
    call()
    start = time.process_time()
    for _ in range(calls):
        call()
    return max(time.process_time() - start, 1e-9) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| weight | " + " | ".join(f"{rows} row{'s' * (rows > 1)}" for rows in ROWS) + " |")
    print("| --- |" + " --- |" * len(ROWS))
    for inputs, outputs in WEIGHTS:
        cells = (ratio(rows, inputs, outputs, given.rounds) for rows in ROWS)
        print(f"| {inputs} x {outputs} | " + " | ".join(f"{times:.2f} ({us:,.0f} us)" for us, times in cells) + " |")


if __name__ == "__main__":
    main()
