"""Model Runner V2: whose rows a step holds. Written against vLLM 0.32's source; no GPU has run it yet.

The runner asks the model for the class of its state. This one notes requests as they come and go, and tells the model's
runtime of a step where the runner asks for its attention metadata.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .requests import NOTE, visual_ranges
from .runtime import Runtime, facts_of


@dataclass(frozen=True, eq=False)
class Noted:
    """A request, from its arrival to its end."""

    features: list
    note: dict | None


class RequestNotes:
    """The requests that a worker knows, by id."""

    def __init__(self, runtime: Runtime, sharing: bool):
        self.runtime, self.sharing = runtime, sharing
        self.known: dict[str, Noted] = {}

    def add(self, request) -> None:
        extra = (request.sampling_params and request.sampling_params.extra_args) or {}
        self.known[request.req_id] = Noted(list(request.mm_features), extra.get(NOTE))

    def remove(self, request_id: str) -> None:
        self.known.pop(request_id, None)

    def begin(self, request_ids: list[str], query_start: np.ndarray, lengths: np.ndarray) -> None:
        """A step of these requests; dummy batches name requests that nobody knows, and padding has no name."""
        members = [self.known.get(each) for each in request_ids[: len(lengths)]]
        self.runtime.begin(members, self._facts, query_start[: len(lengths) + 1], lengths)

    def _facts(self, noted: Noted | None):
        if noted is None:
            return [], 0, False
        return facts_of(visual_ranges(noted.features), noted.note, self.runtime.loaded, self.sharing)


def planned_state(base: type, runtime: Runtime) -> type:
    """`base`, vLLM's state of a model, with a step told to `runtime` before its attention metadata is built."""

    class PlannedModelState(base):
        def __init__(self, vllm_config, *args, **kwargs):
            super().__init__(vllm_config, *args, **kwargs)
            self._notes = RequestNotes(runtime, bool(vllm_config.cache_config.enable_prefix_caching))

        def add_request(self, req_index, new_req_data):
            super().add_request(req_index, new_req_data)
            self._notes.add(new_req_data)

        def remove_request(self, req_id):
            super().remove_request(req_id)
            self._notes.remove(req_id)

        def prepare_attn(self, input_batch, *args, **kwargs):
            # without full graphs, which planned builders do not support, metadata is of the unpadded batch
            self._notes.begin(
                input_batch.req_ids,
                input_batch.query_start_loc_np[: input_batch.num_reqs + 1],
                input_batch.seq_lens_cpu_upper_bound.numpy()[: input_batch.num_reqs],
            )
            return super().prepare_attn(input_batch, *args, **kwargs)

    return PlannedModelState
