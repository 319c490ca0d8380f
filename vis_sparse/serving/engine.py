"""The plug-in's hold on vLLM: six of its functions are wrapped, and each does what it did where no plan is asked for.

- `EngineArgs.create_engine_config`: a plan is read and refused here, in the caller's process, before anything starts.
- weights processed after loading: the model is made to run plans (`install`).
- `GPUModelRunner._build_attention_metadata` (Model Runner V1, all CPUs): tells whose rows a step holds.
- `InputProcessor.process_inputs`: a request's plan and layout.
- `KVCacheManager.allocate_slots` and `get_computed_blocks`: which blocks a request does without (`kv_blocks`).

Model Runner V2 is told by `model_state`.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from .errors import ServingError
from .groups import has_two_tables, unseen_layers, unseen_plans
from .metrics import count
from .requests import ASKED, NOTE, asked_plan, note_of, salted, visual_ranges
from .savings import Savings, of_one_image, savings_of
from .settings import KEY, Loaded, TextShape, is_loaded, read_carried, read_settings
from .step import merged_segments
from .tables import blocks_not_held

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.vis_sparse")  # vLLM's own handlers and format
VERSIONS = ("0.32",)


def register() -> None:
    """The entry point `vllm.general_plugins`: runs once in every process of an engine."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs.create_engine_config, "_vis_sparse"):
        return
    _wrap(EngineArgs, "create_engine_config", _configured)
    if _supported(vllm.__version__):
        _hold()


def _supported(version: str) -> bool:
    return any(version == each or version.startswith(f"{each}.") for each in VERSIONS)


def _hold() -> None:
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _wrap(base_loader, "process_weights_after_loading", _loaded)
    _wrap(GPUModelRunner, "_build_attention_metadata", _begun)
    _wrap(InputProcessor, "process_inputs", _noted)
    _wrap(KVCacheManager, "allocate_slots", _met)
    _wrap(KVCacheManager, "get_computed_blocks", _looked_up)


def _wrap(owner, name: str, wrapper) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    wrapped._vis_sparse = original
    setattr(owner, name, wrapped)


def loaded_plans(vllm_config: VllmConfig) -> Loaded | None:
    """The plans of an engine, None if it has none."""
    block = vllm_config.additional_config.get(KEY) if isinstance(vllm_config.additional_config, dict) else None
    return Loaded.from_block(block) if is_loaded(block) else None


def text_shape(vllm_config: VllmConfig) -> TextShape:
    config = vllm_config.model_config.hf_text_config
    heads = config.num_attention_heads
    return TextShape(
        config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", None) or heads, config.intermediate_size
    )


def _configured(original, *args, **kwargs):
    vllm_config = original(*args, **kwargs)
    told = vllm_config.additional_config if isinstance(vllm_config.additional_config, dict) else {}
    carried = getattr(vllm_config.model_config.hf_config, KEY, None)
    block = told.get(KEY, carried)
    if block is None or is_loaded(block):
        return vllm_config
    import vllm

    if not _supported(vllm.__version__):
        raise ServingError(
            f"vis_sparse: got vLLM {vllm.__version__}, expected {' or '.join(VERSIONS)} (the plug-in holds on to "
            f"internal functions, and was tested with these; {KEY}: null serves the checkpoint as vLLM does)"
        )
    from .refusals import check_engine

    check_engine(vllm_config)
    shape, cache_block = text_shape(vllm_config), vllm_config.cache_config.block_size
    read = read_settings if KEY in told else read_carried
    loaded = read(block, shape, cache_block)
    for plan, savings in zip(loaded.plans, savings_of(loaded.kinds(shape), len(loaded.plans), shape)):
        logger.info("vis_sparse: %s%s", savings.line(plan.name), of_one_image(vllm_config.model_config.hf_config, plan))
    vllm_config.additional_config = {**told, KEY: loaded.to_block()}
    return vllm_config


def _loaded(original, model, model_config, *args, **kwargs):
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    loaded = None if vllm_config is None else loaded_plans(vllm_config)
    if loaded is not None and model_config is vllm_config.model_config:
        from .install import install

        install(model, vllm_config, loaded, text_shape(vllm_config))
    return original(model, model_config, *args, **kwargs)


def _begun(original, runner, **kwargs):
    if "_vis_sparse_planned" not in runner.__dict__:
        runner._vis_sparse_planned = loaded_plans(runner.vllm_config) is not None
    if runner._vis_sparse_planned:
        from .runner import begin_step

        begin_step(runner, **kwargs)
    return original(runner, **kwargs)


def _met(original, manager, request, *args, **kwargs):
    for each in _unseen(manager):
        each.meet(request)
    return original(manager, request, *args, **kwargs)


def _looked_up(original, manager, request):
    for each in _unseen(manager)[:1]:
        with each.looking_up(request):
            return original(manager, request)
    return original(manager, request)


def _unseen(manager) -> list:
    """The parts of a KV cache manager that hold no visual keys; vLLM tells them a request's name alone."""
    if "_vis_sparse_unseen" not in manager.__dict__:
        parts = manager.coordinator.single_type_managers
        manager._vis_sparse_unseen = [part for part in parts if type(part).__name__ == "UnseenManager"]
    return manager._vis_sparse_unseen


def _noted(original, processor, *args, **kwargs):
    request = original(processor, *args, **kwargs)
    desk = _desk(processor)
    if desk is None or request.sampling_params is None:
        return request
    params = request.sampling_params  # the processor's own copy
    ranges = visual_ranges(request.mm_features or ())
    try:
        if request.resumable:
            raise ServingError("got a session whose input goes on (resumable), expected whole prompts under a plan")
        note = note_of(desk.loaded, ranges, asked_plan(params.extra_args))
    except ServingError as error:
        _refuse(processor, request, error)
    params.extra_args = {**(params.extra_args or {}), NOTE: note}
    params.extra_args.pop(ASKED, None)
    request.cache_salt = salted(note, request.cache_salt, desk.loaded, desk.lays_out)
    if note["compact"] and note["plan"] in desk.lays_out:
        params.skip_reading_prefix_cache = True  # its own copies (n > 1) have its salt
    visual, blocks = sum(last + 1 - first for first, last in ranges), 0
    if note["plan"] in desk.unseen_plans:
        tokens, block = len(request.prompt_token_ids), desk.loaded.block
        blocks = desk.unseen_layers * blocks_not_held(merged_segments(ranges), tokens, block, note["compact"])
    count(desk.loaded.names[note["plan"]], visual, desk.savings[note["plan"]], blocks)
    return request


def _refuse(processor, request, error: ServingError) -> NoReturn:
    """An error of the client's (HTTP 400). vLLM noted the request's images as sent to the engine, which never sees
    them: they are to be sent again with whoever shows them next."""
    from vllm.exceptions import VLLMValidationError

    cache = processor.renderer.mm_processor_cache
    if cache is not None:
        for feature in request.mm_features or ():
            cache.invalidate(feature.mm_hash)
    raise VLLMValidationError(str(error)) from None


@dataclass(frozen=True)
class _Desk:
    """What is known where requests come in.

    unseen_layers: how many have block tables of their own, without visual keys, under the plans `unseen_plans`.
    """

    loaded: Loaded
    savings: list[Savings]
    unseen_layers: int
    unseen_plans: tuple[int, ...]

    @property
    def lays_out(self) -> frozenset[int]:
        return frozenset(plan for plan, savings in enumerate(self.savings) if savings.keys)


def _desk(processor) -> _Desk | None:
    """Of an input processor, made at its first request."""
    if "_vis_sparse_desk" not in processor.__dict__:
        loaded = loaded_plans(processor.vllm_config)
        processor._vis_sparse_desk = None if loaded is None else _desk_of(loaded, processor.vllm_config)
    return processor._vis_sparse_desk


def _desk_of(loaded: Loaded, vllm_config: VllmConfig) -> _Desk:
    shape = text_shape(vllm_config)
    layers = loaded.kinds(shape)
    apart = (len(unseen_layers(layers)), unseen_plans(layers)) if has_two_tables(layers, vllm_config) else (0, ())
    return _Desk(loaded, savings_of(layers, len(loaded.plans), shape), *apart)
