"""The parity table as Markdown, measured: `python -m tests.patches`.

A cell: the largest difference of the dense plan from the unpatched model (float32) and of random plans from the oracle
(float64, relative to the largest logit).
"""

import torch
import transformers

from .cases import CASES
from .parity import dense_errors, oracle_error
from .scenarios import SCENARIOS


def cell(case, scenario) -> str:
    if scenario.has_video and not case.video:
        return "-"
    dense, same_tokens = dense_errors(case, scenario)
    plans = max(oracle_error(case, scenario, semantics) for semantics in ("exclude", "zero"))
    tokens = "" if same_tokens else ", **other tokens**"
    return f"{dense:.0e} / {plans:.0e}{tokens}"


@torch.no_grad()
def main() -> None:
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| family |", " | ".join(SCENARIOS), "|")
    print("| --- |", " | ".join("---" for _ in SCENARIOS), "|")
    for case in CASES:
        print(f"| {case.name} |", " | ".join(cell(case, scenario) for scenario in SCENARIOS.values()), "|", flush=True)


if __name__ == "__main__":
    main()
