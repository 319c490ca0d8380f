"""Operations that a call dispatches, by kind: what an eager model pays for whatever the arithmetic is."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NOTHING = (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default)
_KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise", "linear"),
    "attention": ("_scaled_dot_product", "scaled_dot_product", "runs", "near", "mass", "flex_attention"),
    "copies": ("cat", "copy_", "clone", "index_select", "index_copy", "index_copy_", "index", "_to_copy"),
}


class Launches(TorchDispatchMode):
    """Counts what is dispatched inside: `ops` do work, `views` only look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.ops, self.views = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = func.is_view or func in _NOTHING
        (self.views if is_view else self.ops)[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def totals(self) -> tuple[int, int]:
        """(without views, with views)"""
        ops, views = sum(self.ops.values()), sum(self.views.values())
        return ops, ops + views

    def by_kind(self) -> dict[str, int]:
        """Operations without views, by kind; "others" are elementwise or reduce."""
        found = dict.fromkeys((*_KINDS, "others"), 0)
        for name, count in self.ops.items():
            found[_kind(name.split(".")[1])] += count
        return found


def _kind(operation: str) -> str:
    for kind, names in _KINDS.items():
        if operation in names or kind == "attention" and operation.startswith(names):
            return kind
    return "others"
