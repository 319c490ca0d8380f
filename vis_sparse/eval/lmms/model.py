"""The model `vis_sparse` of lmms-eval: one of lmms-eval's own model classes, patched and metered."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

from ...calibration.records import whole_images
from ...checkpoints.errors import MALFORMED, CheckpointError
from ...checkpoints.loaded import check_loaded
from ...patches import patch, unpatch
from ...patches.errors import PatchError
from ...plans.layer_plan import reason
from .bases import base_class
from .columns import SampleCost, install
from .conversation import converse, turns
from .cost_meter import CostMeter, Key, words


class VisSparse(lmms):
    """`--model vis_sparse`. lmms-eval makes its models by `create_from_arg_string`; the object is of a class made for
    the checkpoint (`load`)."""

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> lmms:
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        # max_batch_size is for models that find their batch size; none of the bases does
        given.pop("max_batch_size", None)
        return load(**simple_parse_args_string(arg_string) | given, simple=cls.is_simple)


class SimpleVisSparse(VisSparse):
    """The same under `--force_simple`: plain prompts where the base has a class for them."""

    is_simple = True


def load(
    pretrained: str | None = None,
    plan: str = "auto",
    calibration: str | None = None,
    heads: str | None = None,
    backend: str = "auto",
    paired: int = 0,
    dtype: str | None = None,
    base: str | None = None,
    simple: bool = False,
    **arguments,
) -> lmms:
    """A model for lmms-eval: its own class for the checkpoint, under `plan`.

    pretrained: a checkpoint folder or name. plan, calibration, heads, backend: as in `vis_sparse.patch`; "dense" is the
    unpatched model. paired: samples of each task for which the unpatched model is timed too, in turns. dtype: of the
    weights. base: name of lmms-eval's model, instead of the one for the checkpoint's model_type. arguments: for the
    base. Raises PatchError or PlanError.
    """
    if pretrained is None:
        raise PatchError("pretrained: got none, expected a checkpoint folder or name")
    kind = base_class(pretrained, base, simple)
    if str(arguments.get("device")) == "cpu":
        arguments.setdefault("device_map", "cpu")  # without it, bases take several processes for several GPUs
    takes_dtype = "dtype" in inspect.signature(kind.__init__).parameters
    if dtype is not None and takes_dtype:
        arguments["dtype"] = dtype
    try:
        # without memory for weights: lmms-eval's classes do not tell what was missing
        _, loaded = AutoModelForImageTextToText.from_pretrained(
            pretrained, device_map="meta", output_loading_info=True
        )
        check_loaded(pretrained, loaded)
        model = type(f"VisSparse{kind.__name__}", (PatchedModel, kind), {})(pretrained=pretrained, **arguments)
    except (*MALFORMED, OSError, SafetensorError, ImportError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise PatchError(f"model: got {pretrained!r}, expected a multimodal checkpoint ({reason(error)})") from None
    if dtype is not None and not takes_dtype:
        model.model.to(getattr(torch, dtype))
    install()
    model.use_plan(plan, calibration=calibration, heads=heads, backend=backend, paired=int(paired))
    return model


class PatchedModel:
    """What a base class of lmms-eval gains: a plan, costs with its answers, and conversations on a kept cache."""

    meter: CostMeter | None = None

    def use_plan(self, plan: str, calibration=None, heads=None, backend: str = "auto", paired: int = 0) -> None:
        """Run under another plan from now on. Arguments as in `load`."""
        if self.meter is not None:
            self.meter.remove()
        if plan == "dense":
            unpatch(self.model)
        else:
            patch(self.model, plan, heads=heads, calibration=calibration, backend=backend)
        self.meter = CostMeter(self.model, paired)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The base's answers, with their costs. A request whose document cannot be read is answered by "" and an error
        in its cost."""
        errors = self._unreadable(requests)
        self.meter.costs.clear()
        task_dict = self.task_dict
        self.task_dict = self.meter.reading(task_dict)
        try:
            given = iter(super().generate_until([request for request in requests if _key(request) not in errors]))
        finally:
            self.task_dict = task_dict
        if self.meter.error is not None:
            raise self.meter.error
        return [self._answer(request, errors) or self._costed(next(given), request) for request in requests]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        """Every document's questions one after the other in one conversation, on a KV cache that is kept."""
        errors = self._unreadable(requests)
        answers = []
        for request in requests:
            answer = self._answer(request, errors)
            if answer is None:
                document = self._document(request)
                answer = GenerationResult(*converse(self.meter, self._processor(), turns(request, document), request))
            answers.append(answer)
        return answers

    def _unreadable(self, requests: list[Instance]) -> dict[Key, str]:
        """Why documents cannot be read, broken images above all. If none can, that is no matter of single documents
        and the first error is raised."""
        errors, first = {}, None
        with whole_images():
            for request in requests:
                try:
                    _media(request)(self._document(request))
                except Exception as error:
                    first = first or error
                    errors[_key(request)] = words(error)
        if errors.keys() >= {_key(request) for request in requests} and first is not None:
            raise first
        for (task, _, number), error in errors.items():
            logger.error(f"{task}: sample {number} cannot be read and counts as answered wrong ({error})")
        return errors

    def _answer(self, request: Instance, errors: dict[Key, str]) -> GenerationResult | None:
        error = errors.get(_key(request))
        return None if error is None else GenerationResult("", SampleCost(error=error))

    def _costed(self, answer, request: Instance) -> GenerationResult:
        text, counts = unwrap_generation_output(answer)
        cost = self.meter.costs.get(_key(request), SampleCost())
        if counts is not None:
            known = {name: getattr(counts, name) for name in ("input_tokens", "output_tokens", "reasoning_tokens")}
            cost = replace(cost, **known)
        return GenerationResult(text, cost)

    def _document(self, request: Instance):
        task, split, number = _key(request)
        return self.task_dict[task][split][number]

    def _processor(self):
        return getattr(self, "processor", None) or self._image_processor


def _key(request: Instance) -> Key:
    """Whatever the kind of request, these are its last arguments."""
    number, task, split = request.args[-3:]
    return task, split, number


def _media(request: Instance):
    """The function of a request that reads a document's images."""
    return next(argument for argument in request.args if callable(argument))
