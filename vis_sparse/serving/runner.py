"""Model Runner V1: whose rows a step holds."""

from __future__ import annotations

from .errors import ServingError
from .install import RUNTIME
from .requests import NOTE, visual_ranges
from .runtime import Runtime, facts_of


def begin_step(runner, *, num_reqs: int, num_scheduled_tokens: dict | None = None, **_) -> None:
    """Tell the model's runtime of the step of `num_reqs` requests whose attention metadata the runner builds next.

    num_scheduled_tokens: by request; dummy steps, which have none, have no visual rows either.
    """
    runtime: Runtime | None = getattr(runner.get_model(), RUNTIME, None)
    if runtime is None:
        raise ServingError(
            f"got a plan and a model of {type(runner.get_model()).__name__} that was loaded without it, expected a "
            "--load-format of vLLM's default loader"
        )
    ids = runner.input_batch.req_ids if num_scheduled_tokens is not None else []
    sharing = bool(runner.cache_config.enable_prefix_caching)
    runtime.begin(
        list(map(runner.requests.__getitem__, ids)),
        lambda state: _facts(state, runtime, sharing),
        runner.query_start_loc.np[: num_reqs + 1],
        runner.optimistic_seq_lens_cpu.numpy()[:num_reqs],
    )


def _facts(state, runtime: Runtime, sharing: bool):
    extra = (state.sampling_params and state.sampling_params.extra_args) or {}
    return facts_of(visual_ranges(state.mm_features), extra.get(NOTE), runtime.loaded, sharing)
