"""Commands under a launcher of several processes: `accelerate launch -m vis_sparse calibrate ...`."""

from __future__ import annotations

import os


def join(device: str) -> tuple[str, bool]:
    """(the device of this process, whether it is the one that reports); joins the launcher's process group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, True
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return str(state.device), state.is_main_process
