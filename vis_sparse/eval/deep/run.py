"""A training that has a budget of time, may be killed, and is shared by several processes.

Learning rates follow the share of the budget that is spent: the last step has a rate of zero on any machine. Time is
the processor's, of one process: a training that other work crowds out, or that is stopped for a while, loses no steps.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.nn import Parameter

T = TypeVar("T")
SAVE_SECONDS = 120
STATE = "state.safetensors"


@dataclass(frozen=True)
class Schedule:
    """minutes: the budget. warmup: its share until the full rate. decay: its share, at the end, over which the rate
    falls to `last` of the full rate, along a cosine."""

    minutes: float
    warmup: float = 0.02
    decay: float = 0.3
    last: float = 0.0

    def factor(self, spent: float) -> float:
        """What the rate is multiplied by when the share `spent` of the budget is."""
        down = min(1.0, max(0.0, (spent - 1 + self.decay) / self.decay))
        return min(1.0, spent / self.warmup) * (1 - (1 - self.last) * (1 - math.cos(math.pi * down)) / 2)


class Run:
    """Step, time, optimiser and log of a training, kept in a folder.

    groups: (full rate, {name: parameter}). With several processes (`torch.distributed`) gradients are averaged; the
    first one writes.
    """

    def __init__(
        self, folder: Path, schedule: Schedule, groups: list[tuple[float, dict[str, Parameter]]], weight_decay=0.0
    ):
        self.folder, self.schedule = folder, schedule
        self.step, self.spent_before = 0, 0.0
        self.parameters = {name: p for _, group in groups for name, p in group.items()}
        self.rates = [rate for rate, _ in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(group.values())} for _, group in groups],
            betas=(0.9, 0.95), weight_decay=weight_decay, fused=True,
        )  # fmt: skip
        self.file, self.log_file = folder / STATE, folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self._load()
        if distributed.is_initialized():
            for parameter in self.parameters.values():
                distributed.broadcast(parameter.data, 0)
        self.started = self.saved = time.process_time()
        self.progress = self.seconds() / (60 * schedule.minutes)
        self.log(machine=machine())

    def seconds(self) -> float:
        return self.spent_before + time.process_time() - self.started

    @property
    def done(self) -> bool:
        return self.progress >= 1

    def advance(self, loss: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        """One step down the sum of the losses; returns them, averaged over the processes."""
        values = loss()
        sum(values.values()).backward()
        spent = self.seconds() / (60 * self.schedule.minutes)
        progress, *means = self._average([spent, *(value.item() for value in values.values())])
        self.progress = progress
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        factor = self.schedule.factor(min(1.0, progress))
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if time.process_time() - self.saved > SAVE_SECONDS:
            self.save()
        return dict(zip(values, means, strict=True)) | {"norm": norm.item()}

    def _average(self, numbers: list[float]) -> list[float]:
        """Average gradients and `numbers` over the processes."""
        if not distributed.is_initialized():
            return numbers
        # what a step does not train has none, and none in the other processes either
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads] + [torch.tensor(numbers)])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        *parts, numbers = flat.split([grad.numel() for grad in grads] + [len(numbers)])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        return numbers.tolist()

    def save(self) -> None:
        self.saved = time.process_time()
        if rank() != 0:
            return
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter.detach().contiguous()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.contiguous()
        new = self.folder / "state.new"
        save_file(tensors, new, metadata={"step": str(self.step), "seconds": str(self.seconds())})
        os.replace(new, self.file)

    def _load(self) -> None:
        with safe_open(self.file, "pt") as state, torch.no_grad():
            self.step, self.spent_before = int(state.metadata()["step"]), float(state.metadata()["seconds"])
            stored = set(state.keys())
            for name, parameter in self.parameters.items():
                parameter.copy_(state.get_tensor(f"weight/{name}"))
                moments = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in stored]
                if moments:
                    self.optimizer.state[parameter] = {key: state.get_tensor(f"{key}/{name}") for key in moments}
        if rank() == 0 and self.log_file.exists():
            lines = [line for line in self.log_file.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            self.log_file.write_text("".join(line + "\n" for line in kept))

    def log(self, **facts) -> None:
        if rank() == 0:
            record = {"step": self.step, "seconds": round(self.seconds(), 1), **facts}
            with self.log_file.open("a") as file:
                file.write(json.dumps(record) + "\n")


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def gathered(mine: T) -> list[T]:
    """Every process's, in each."""
    if not distributed.is_initialized():
        return [mine]
    every = [None] * world()
    distributed.all_gather_object(every, mine)
    return every


def join() -> None:
    """Be one of the processes that `torch.distributed.run` has started, if it has."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")


def machine() -> dict[str, str | int]:
    return {
        "processor": platform.machine(),
        "processes": world(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}
