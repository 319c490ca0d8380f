"""What a worker keeps about the plans of its model: the requests of the step, and what each layer takes from them.

Tensors, but no engine: the engine's own objects come in as arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .errors import ServingError
from .kinds import READ, TEXT, LayerKinds
from .settings import Loaded, TextShape
from .step import Batch, Step, merged_segments
from .tables import block_columns, compact_slots, head_copies

Facts = tuple[list[tuple[int, int]], int, bool]  # segments, plan, layout A


class Runtime:
    """Plans, layers by what they do, and the current step."""

    def __init__(self, loaded: Loaded, shape: TextShape):
        self.loaded = loaded
        self.shape = shape
        self.layers: tuple[LayerKinds, ...] = loaded.kinds(shape)
        self.step: Step | None = None
        # by the layer's name, of the current step
        self.slots: dict[str, torch.Tensor] = {}
        self.copies: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._rows: dict[Any, torch.Tensor | None] = {}
        self._members: list = []
        self._batch: Batch | None = None
        self._frozen = frozenset(
            plan
            for plan in range(len(loaded.plans))
            if all(layer.attention[plan] in (READ, TEXT) and layer.neurons[plan] == 0 for layer in self.layers)
        )

    def begin(self, members: list, facts: Callable[[Any], Facts], query_start: np.ndarray, lengths: np.ndarray) -> None:
        """A step of `members` (any objects, the same ones as long as they are the same requests).

        facts: of a member; asked only when the batch changed. Rows beyond the members' are padding: no visual token.
        """
        requests = len(lengths)
        same = self._batch is not None and len(self._batch.plans) == requests and len(self._members) == len(members)
        if not (same and all(map(operator.is_, self._members, members))):
            segments, plans, compact = zip(*map(facts, members)) if members else ((), (), ())
            missing = requests - len(members)
            self._batch = Batch.of(
                [*segments, *[()] * missing], [*plans, *[0] * missing], [*compact, *[False] * missing]
            )
            self._members = list(members)
        self.step = Step(self._batch, query_start, lengths)
        self.slots, self.copies, self._rows = {}, {}, {}

    def take_step(self) -> Step | None:
        """The step that was begun, once."""
        step, self.step = self.step, None
        return step

    def is_frozen(self, step: Step) -> bool:
        """Whether no layer changes any visual row of the step."""
        return step.visual_plans <= self._frozen

    def rows(self, key, rows: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
        """`rows` on the device, kept under `key` for the step."""
        if key not in self._rows:
            self._rows[key] = None if rows is None else torch.from_numpy(rows).to(device, non_blocking=True)
        return self._rows[key]

    def attention(self, kinds: tuple[int, ...], names: Sequence[str], common, block: int):
        """`common`, the engine's metadata of the whole step, as that of the queries of layers of these kinds.

        names: of layers that share a block table. Leaves their slots and block copies for the forward. None if they
        have no query in this step.
        """
        step = self.step
        if step is None:
            raise ServingError("attention metadata was asked for outside a step: expected the hooks of this plug-in")
        if not step.has_visual and TEXT not in kinds:
            return common  # every request is one run of text, and reads all that is before it
        sequences = step.sequences(kinds)
        device, table = common.block_table_tensor.device, common.block_table_tensor
        rows = self.rows(("queries", kinds), sequences.rows, device)
        slots = common.slot_mapping if rows is None else common.slot_mapping[rows]
        moved = compact_slots(step, kinds, sequences.rows, block)
        if moved is not None:
            request, column, offset = (
                torch.from_numpy(each).to(device) for each in (moved.request, moved.column, moved.offset)
            )
            slots = slots.clone()
            place = table[request, column].to(slots.dtype) * block + offset
            slots[torch.from_numpy(moved.row).to(device)] = place.to(slots.dtype)
        if slots is not common.slot_mapping:
            self.slots |= dict.fromkeys(names, slots)
        if TEXT in kinds:
            copies = [
                tuple(
                    table[torch.from_numpy(each.request).to(device), torch.from_numpy(column).to(device)].long()
                    for column in (each.source, each.target)
                )
                for each in head_copies(step, kinds, block)
            ]
            self.copies |= dict.fromkeys(names, copies)
        if not len(sequences.request):
            return None
        columns = block_columns(step.batch, sequences, block, table.shape[1])
        return _narrowed(common, sequences, rows, slots, columns, table)


def _narrowed(common, sequences, rows, slots, columns, table):
    """`common` with one entry a sequence instead of one a request."""
    device, keys = table.device, sequences.keys.astype(np.int32)
    request = torch.from_numpy(sequences.request).to(device)
    start = torch.from_numpy(sequences.query_start)
    lengths = torch.from_numpy(keys)
    if columns is not None:
        table = torch.gather(table[request], 1, torch.from_numpy(columns).to(device))
    elif len(sequences.request) != table.shape[0] or rows is not None:
        table = table[request]
    changes: dict[str, Any] = {}
    if common.positions is not None and rows is not None:
        changes["positions"] = common.positions[rows]
    if common.is_prefilling is not None:
        changes["is_prefilling"] = common.is_prefilling[torch.from_numpy(sequences.request)]
    return common.replace(
        query_start_loc=start.to(device),
        query_start_loc_cpu=start,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(sequences.request),
        num_actual_tokens=int(start[-1]),
        max_query_len=int((sequences.end - sequences.first).max()),
        max_seq_len=int(keys.max()),
        block_table_tensor=table,
        slot_mapping=slots,
        mm_req_doc_ranges=None,
        req_idx=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **changes,
    )


def facts_of(ranges: Sequence[tuple[int, int]], note: dict | None, loaded: Loaded, sharing: bool) -> Facts:
    """Segments, plan and layout of a request from its visual ranges and the note that `requests.note_of` left on it."""
    segments = merged_segments(ranges)
    if note is None:
        if segments and sharing:
            raise ServingError(
                "a request with images came without the plug-in's note on its layout, and prefixes are shared: "
                "expected requests that passed vLLM's own InputProcessor"
            )
        return segments, 0, True
    return segments, note["plan"], note["compact"]
