"""Counts and times every `generate` of a model, patched or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...cost.flops import flops
from ...cost.shape_lookup import shape_of
from ...layout.layout import LayoutError, VisualLayout
from ...patches import inspect, read_layout, unpatched
from ...patches.errors import PatchError
from ...plans.layer_plan import PlanError
from ...plans.plan import VisualPlan
from ..plan_strip import plan_strip
from ..timing import timed
from .columns import SampleCost

Key = tuple[str, str, int]  # task, split, number of the document


class CostMeter:
    """Stands before a model's `generate`. `costs` has what each document cost, `error` what stopped the plan, `strip`
    what the plan leaves of the first prompt with images (`plan_strip`).

    lmms-eval's model classes read a batch's documents from their `task_dict`, row by row, and then generate: `reading`
    notes which, and so whose the rows are.
    """

    def __init__(self, model, paired: int = 0):
        """paired: documents of each task to time under the unpatched model too."""
        self.model, self.paired = model, paired
        self.costs: dict[Key, SampleCost] = {}
        self.error: ValueError | None = None
        self.strip: dict | None = None
        self._read: list[Key] = []
        self._pairs = Counter()
        self._is_warm = self._is_dense_first = False
        self._shape, self._counted = shape_of(model), {}
        self._install()

    def _install(self) -> None:
        self._before, self._plain_generate = vars(self.model).get("generate"), self.model.generate
        self.model.generate = self.generate

    def remove(self) -> None:
        if self._before is None:
            del self.model.generate  # of the instance; the class has its own
        else:
            self.model.generate = self._before  # a patch's

    def reading(self, task_dict: Mapping) -> Mapping:
        """`task_dict` ({task: {split: documents}}), noting what is read from it."""
        return {
            task: {split: _Documents(self, task, split, documents) for split, documents in splits.items()}
            for task, splits in task_dict.items()
        }

    def note(self, key: Key) -> None:
        if self.error is not None:
            raise self.error
        self._read.append(key)

    def generate(self, *args, **kwargs):
        """The model's own `generate`."""
        rows = self._rows(kwargs)
        self._read.clear()
        seconds = {}
        try:
            costs = self._batch_costs(kwargs) if rows else []
            if rows and self._is_paired(rows, kwargs):
                output, seconds["seconds"], seconds["seconds_dense"] = self._run_paired(*args, **kwargs)
            else:
                output, seconds["seconds"] = self.run(*args, **kwargs)
        except (PatchError, PlanError, LayoutError) as error:
            # some of lmms-eval's classes answer "" whatever happens in `generate`
            self.error = error
            raise
        except Exception as error:
            self.costs.update({row: SampleCost(error=words(error)) for row in rows})
            raise
        for row, cost in zip(rows, costs):
            self.costs[row] = replace(cost, **{name: value / len(rows) for name, value in seconds.items()})
        return output

    def run(self, *args, **kwargs):
        """The model's own `generate`, of which nothing is noted: (its output, seconds)."""
        output = []
        seconds = timed(lambda: output.append(self._plain_generate(*args, **kwargs)), self.model.device)
        return output[0], seconds

    def cost(self, layout: VisualLayout, text_tokens: int) -> SampleCost:
        """The counts of one sample: its layout without padding, and its text tokens."""
        key = (layout, text_tokens)
        if key not in self._counted:
            state = inspect(self.model)
            settings = dict(layout=layout, text_tokens=text_tokens, kv_dtype_bytes=self.model.dtype.itemsize)
            plan = VisualPlan.dense(self._shape.layers) if state is None else state["plan"]
            dense = flops(self._shape, "dense", **settings)
            own = dense if state is None else flops(self._shape, plan, **settings)
            if self.strip is None and layout.num_visual:
                self.strip = plan_strip(plan, own, dense)
            self._counted[key] = SampleCost(
                flops=own.total,
                flops_dense=dense.total,
                kv_bytes=own.kv_bytes,
                kv_bytes_dense=dense.kv_bytes,
                visual_tokens=layout.num_visual,
                text_tokens=text_tokens,
            )
        return self._counted[key]

    def _rows(self, kwargs: dict) -> list[Key]:
        """Whose the rows of the batch are, [] if that is unknown."""
        size = kwargs["input_ids"].shape[0] if "input_ids" in kwargs else 0
        each_once = list(dict.fromkeys(self._read))
        return next((list(read) for read in (self._read, each_once) if len(read) == size), [])

    def _batch_costs(self, kwargs: dict) -> list[SampleCost]:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else mask.long()
        samples = per_sample(read_layout(self.model, kwargs), real)
        return [self.cost(one, int(row.sum()) - one.num_visual) for one, row in zip(samples, real)]

    def _is_paired(self, rows: list[Key], kwargs: dict) -> bool:
        task = rows[0][0]
        if inspect(self.model) is None or kwargs.get("do_sample") or self._pairs[task] >= self.paired:
            return False
        self._pairs[task] += len(rows)
        return True

    def _run_paired(self, *args, **kwargs):
        """(output, seconds, seconds of the unpatched model), either first every second time. What is done once is done
        before the clocks start."""

        def run_unpatched():
            # a patch has a `generate` of its own below this one
            self.remove()
            try:
                with unpatched(self.model):
                    output = []
                    seconds = timed(lambda: output.append(self.model.generate(*args, **kwargs)), self.model.device)
                    return output[0], seconds
            finally:
                self._install()

        if not self._is_warm:
            self._is_warm = True
            self.run(*args, **kwargs)
            run_unpatched()
        self._is_dense_first = not self._is_dense_first
        if self._is_dense_first:
            _, seconds_dense = run_unpatched()
        output, seconds = self.run(*args, **kwargs)
        if not self._is_dense_first:
            _, seconds_dense = run_unpatched()
        return output, seconds, seconds_dense


class _Documents:
    """Documents of a split that tell the meter which of them is read."""

    def __init__(self, meter: CostMeter, task: str, split: str, documents):
        self._meter, self._task, self._split, self._documents = meter, task, split, documents

    def __getitem__(self, index: int):
        self._meter.note((self._task, self._split, index))
        return self._documents[index]

    def __len__(self) -> int:
        return len(self._documents)


def per_sample(layout: VisualLayout | None, real: Tensor) -> list[VisualLayout]:
    """The layout of each sample of a batch by itself, in positions that do not count padding. real: (batch, columns),
    1 where a token is none."""
    position = (real.cumsum(1) - 1).tolist()
    placed = [[] for _ in position]
    for segment in () if layout is None else layout.segments:
        grid = (segment.frames, segment.height, segment.width)
        placed[segment.sample].append((position[segment.sample][segment.start], grid))
    return [VisualLayout.from_grids([grids]) for grids in placed]


def words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
