"""Model Runner V1: whose rows a step holds."""

from __future__ import annotations

import inspect

from .errors import ServingError
from .install import RUNTIME
from .requests import NOTE, visual_ranges
from .runtime import Runtime, facts_of


def begin_step(runner, build, args, kwargs) -> None:
    """Tell the model's runtime of the step that `build`, the runner's builder of attention metadata, is asked for."""
    runtime: Runtime | None = getattr(runner.get_model(), RUNTIME, None)
    if runtime is None:
        raise ServingError(
            f"got a plan and a model of {type(runner.get_model()).__name__} that was loaded without it, expected a "
            "--load-format of vLLM's default loader"
        )
    call = inspect.signature(build).bind(runner, *args, **kwargs).arguments
    requests = call["num_reqs"]
    # dummy steps name no tokens of requests
    ids = runner.input_batch.req_ids if call.get("num_scheduled_tokens") is not None else []
    sharing = bool(runner.cache_config.enable_prefix_caching)
    runtime.begin(
        list(map(runner.requests.__getitem__, ids)),
        lambda state: _facts(state, runtime, sharing),
        runner.query_start_loc.np[: requests + 1],
        runner.optimistic_seq_lens_cpu.numpy()[:requests],
    )


def _facts(state, runtime: Runtime, sharing: bool):
    extra = (state.sampling_params and state.sampling_params.extra_args) or {}
    return facts_of(visual_ranges(state.mm_features), extra.get(NOTE), runtime.loaded, sharing)
