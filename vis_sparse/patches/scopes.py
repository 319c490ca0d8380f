"""What holds for some calls of a patched model and for no others: nothing of it lives on the model.

Values are kept in a context variable, so that threads and tasks have their own. A plain generator shares the context of
whoever advances it; what it holds open counts only for calls made from inside it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType


@dataclass(frozen=True, eq=False)
class _Held:
    """value of `name` for calls of `owner`. frame: of the generator from inside which they must come; None: any."""

    owner: object
    name: str
    value: object
    frame: FrameType | None


_HELD: ContextVar[tuple[_Held, ...]] = ContextVar("vis_sparse_held", default=())


@contextmanager
def hold(owner: object, name: str, value: object) -> Iterator[None]:
    """Within the block, `held(owner, name)` is `value` in this context. Blocks may end in any order."""
    entry = _Held(owner, name, value, _generator_frame(sys._getframe(1)))
    _HELD.set((*_HELD.get(), entry))
    try:
        yield
    finally:
        _HELD.set(tuple(other for other in _HELD.get() if other is not entry))


def held(owner: object, name: str):
    """The innermost value of `name` that holds for a call of `owner` made here; None if there is none."""
    for entry in reversed(_HELD.get()):
        if entry.owner is owner and entry.name == name and (entry.frame is None or _is_running(entry.frame)):
            return entry.value
    return None


def _generator_frame(frame: FrameType | None) -> FrameType | None:
    """The frame that opens the block, if it is a generator's; context managers around it are looked through."""
    while frame is not None and (_is_contextlib(frame) or _is_generator(frame) and _is_contextlib(frame.f_back)):
        frame = frame.f_back
    return frame if frame is not None and _is_generator(frame) else None


def _is_generator(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


def _is_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == "contextlib"


def _is_running(frame: FrameType) -> bool:
    """Whether `frame` is one of the callers of this function."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is frame
