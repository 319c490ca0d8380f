"""What people put around models, before and after patch: `python -m tests.patches.wraps` prints docs/wraps.md's table.

A cell is measured: the same wrap around an unpatched model gives what is right. With a file and names of wraps, this is
one of the processes that these need.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from torch import distributed

import vis_sparse
from vis_sparse import PatchError

from ..models import IMAGE, make_batch, random_plan
from .wrap_kinds import RANKS, WRAPS, Wrap, linears, small_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/wraps.md"
ORDERS = ("before", "after")
RIGHT, NOT_UNPATCHED = "right", "-"


# Actions: what is done with a wrapped model. They give tensors.


def batch():
    return make_batch(small_model(), [(5, IMAGE, 4), (3, IMAGE, 2)])


def inner(called):
    return getattr(called, "module", called)


@torch.no_grad()
def forward(called) -> list[torch.Tensor]:
    call = batch()
    return [called(**call.by_ids()).logits[call.attention_mask.bool()] for _ in range(2)]


@torch.no_grad()
def generate(called) -> list[torch.Tensor]:
    with _whole(called):
        out = inner(called).generate(
            **batch().to_generate(), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return [out.sequences, *out.logits]


def backward(called) -> list[torch.Tensor]:
    call = batch()
    called.train()
    # what a row of padding says of the first word is nobody's business
    labels = call.input_ids.masked_fill(call.attention_mask.cumsum(1) < 2, -100)
    loss = called(**call.by_ids(), labels=labels, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in called.named_parameters() if p.grad is not None}
    return [loss.detach(), *(_local(gradients[name]) for name in sorted(gradients))]


ACTIONS = {"forward": forward, "generate": generate, "backward": backward}


@contextmanager
def _whole(called):
    """FSDP1's way to call methods other than forward."""
    if type(called).__name__ != "FullyShardedDataParallel":
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(called):
        yield


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def twin(wrap: Wrap):
    """A plain model with the weights that a wrapped one computes with."""
    plain = small_model()
    if not wrap.changes:
        return plain
    wrapped = wrap.wrap(small_model())
    base = wrapped.get_base_model() if isinstance(wrapped, peft.PeftModel) else wrapped
    with torch.no_grad():
        for (owner, name), (other, _) in zip(linears(plain), linears(base), strict=True):
            linear = getattr(owner, name)
            linear.weight.copy_(getattr(other, name)(torch.eye(linear.in_features)).T)
    return plain


# Cells


def attempt(action, make, says: list[str] | None = None):
    """What an action gives on what `make` makes, or a word. says: takes what refusals say."""
    try:
        return action(make())
    except PatchError as error:
        if says is not None:
            says.append(str(error))
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def patched(wrap: Wrap, order: str, plan):
    if order == "before":
        return wrap.wrap(vis_sparse.patch(small_model(), plan))
    return vis_sparse.patch(wrap.wrap(small_model()), plan)


def judged(actual, expected, tolerance: float) -> str:
    """The cell's word for what an action gave."""
    if isinstance(expected, str):
        return NOT_UNPATCHED
    if isinstance(actual, str):
        return actual
    if len(actual) != len(expected):
        return f"WRONG: {len(actual)} tensors, expected {len(expected)}"
    largest = max(float(e.abs().max()) for e in expected)
    errors = [float((a - e).abs().max() / e.abs().max().clamp_min(1e-3 * largest)) for a, e in zip(actual, expected)]
    return RIGHT if max(errors) <= tolerance else f"WRONG by {max(errors):.1g}"


def cells(wrap: Wrap) -> dict:
    """Words by order and action, and what refusals say."""
    tolerance, cut = (1e-4 if wrap.exact else 0.1), random_plan(31)
    row: dict = {order: {} for order in ORDERS}
    says: list[str] = []
    for name, action in ACTIONS.items():
        expected = attempt(action, lambda: wrap.wrap(small_model()))
        for order in ORDERS:
            given = attempt(action, lambda: patched(wrap, order, "dense"), says)  # noqa: B023
            row[order][name] = judged(given, expected, tolerance)
            # under a plan that cuts, against a plain model with the same weights
            if row[order][name] == RIGHT and (name == "forward" or not wrap.changes and name == "backward"):
                right = attempt(action, lambda: vis_sparse.patch(_frozen_like(wrap), cut))
                if len(right) == len(expected):  # gradients of the same parameters
                    given = attempt(action, lambda: patched(wrap, order, cut), says)  # noqa: B023
                    row[order][name] = judged(given, right, tolerance)
    for order in ORDERS:
        row[order]["unpatch"] = _unpatched(wrap, order, says)
    return row | dict(says=sorted(set(says)))


def _frozen_like(wrap: Wrap):
    plain = twin(wrap)
    wrapped = dict(inner(wrap.wrap(small_model())).named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad = name not in wrapped or wrapped[name].requires_grad
    return plain


def _unpatched(wrap: Wrap, order: str, says: list[str]) -> str:
    """Whether a wrapped model is what it would be without the patch, once that is undone."""
    expected = attempt(forward, lambda: wrap.wrap(small_model()))

    def undone():
        called = patched(wrap, order, "dense")
        try:
            forward(called)
        except PatchError as error:
            says.append(str(error))
        model = vis_sparse.unpatch(inner(called))
        assert vis_sparse.inspect(model) is None
        return called

    return judged(attempt(forward, undone, says), expected, 0.0)


def measure(wraps) -> dict[str, dict]:
    """The rows of wraps, by name; those of several ranks by processes of their own."""
    rows = {wrap.name: cells(wrap) for wrap in wraps if wrap.ranks == 1}
    names = [wrap.name for wrap in wraps if wrap.ranks > 1]
    return rows | (_by_ranks(names) if names else {})


def _by_ranks(names: list[str]) -> dict[str, dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(RANKS))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.json" for rank in range(RANKS)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.patches.wraps", str(file), *names],
                cwd=ROOT,
                env=common | dict(RANK=str(rank)),
            )
            for rank, file in enumerate(files)
        ]
        try:
            codes = [process.wait(timeout=600) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError(f"ranks: got exit codes {codes}, expected zeros")
        first, *others = (json.loads(file.read_text()) for file in files)
    for other in others:
        assert other == first, "ranks differ"
    return first


def _as_rank(file: Path, names: list[str]) -> None:
    distributed.init_process_group("gloo")
    file.write_text(json.dumps({wrap.name: cells(wrap) for wrap in WRAPS if wrap.name in names}))
    distributed.destroy_process_group()


def lines_of(name: str, row: dict) -> list[str]:
    """A wrap's lines of the table."""
    lines = []
    for order in ORDERS:
        words = (row[order][action] for action in (*ACTIONS, "unpatch"))
        lines.append(f"| {name} | {order} | {' | '.join(words)} |")
    return lines


def table(rows: dict[str, dict]) -> str:
    """Markdown: the table, and what refusals say."""
    columns = ("wrap", "patched", *ACTIONS, "unpatch")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    said: dict[str, list[str]] = {}
    for name, row in rows.items():
        lines += lines_of(name, row)
        for message in row["says"]:
            said.setdefault(message, []).append(name)
    return "\n".join([*lines, "", *(f"- `{message}` ({'; '.join(names)})" for message, names in said.items())])


def main(*arguments: str) -> None:
    torch.set_num_threads(1)
    if arguments:
        _as_rank(Path(arguments[0]), list(arguments[1:]))
    else:
        print(table(measure(WRAPS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
