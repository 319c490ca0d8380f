"""Samples shared out among the processes of a launch (`accelerate launch`, torchrun): sample i to process i % count."""

from __future__ import annotations


def place() -> tuple[int, int]:
    """(this process's rank, number of processes); (0, 1) without a process group."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(value) -> list:
    """The values of all processes by rank, in every process."""
    from torch import distributed

    rank, count = place()
    values = [value] * count
    if count > 1:
        distributed.all_gather_object(values, value)
    return values
