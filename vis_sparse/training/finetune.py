"""Fine-tuning of a model under a plan, so that it computes in training what it will compute afterwards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..patches import Plan, inspect, patch
from ..patches.errors import PatchError
from ..plans.atomic_write import replaced
from ..plans.layer_plan import PlanError
from ..plans.scores import Calibration
from .conversations import Conversation, read_conversations
from .encoding import Encoder
from .records import StepLog, read_log
from .settings import Settings
from .teacher import taught
from .trained_parts import whole_decoder, with_adapters
from .trainer import Collator, EvaluatedBefore, Numbered, PlanTrainer, shares

LOG, FACTS = "log.jsonl", "finetune.json"


def finetune(
    model: nn.Module,
    processor: Any,
    data: str | Path | Sequence[Conversation],
    plan: Plan | None = None,
    *,
    out: str | Path,
    settings: Settings | Mapping[str, Any] | None = None,
    images: str | Path | None = None,
    held_out: str | Path | Sequence[Conversation] | None = None,
    calibration: Calibration | str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_teacher: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Train a multimodal model of transformers under `plan`, in place; returns what was done.

    data: conversations in LLaVA's format, or their file, images relative to `images`. held_out: the same, to evaluate
    on: before the first step dense and under the plan, then every `settings.evaluate` steps. plan, calibration: as in
    `patch`. settings: `Settings`, or some of their values by name. out: gets the checkpoint, or the adapter with
    `lora`, with the plan in it, the processor, `log.jsonl` (a line each `settings.log` steps) and `checkpoint-N`, from
    which a run that was stopped goes on with `resume`: the same losses as if it had not been.

    Raises PlanError, PatchError or SampleError before anything is trained.
    """
    settings = settings if isinstance(settings, Settings) else Settings(**(settings or {}))
    out = Path(out)
    conversations, asked = (_read(each, images) for each in (data, held_out))
    checkpoint = _checkpoint(out, resume)
    patch(model, plan, calibration=calibration)
    resolved = inspect(model)["plan"]
    facts = {"plan": resolved.to_yaml(), "conversations": len(conversations), **dataclasses.asdict(settings)}
    encoder = Encoder(processor, settings.most_tokens)
    encoder(conversations[:1])  # what does not go together is told at once
    if checkpoint is not None:
        _check_same(out / FACTS, facts)
    teacher = None
    if settings.distill:
        place = out / "teacher"
        teacher = taught(model, encoder, conversations, place, settings.top, settings.cache_bytes, on_teacher)
    set_seed(settings.seed)  # adapters begin with random numbers
    if settings.lora is None:
        trained = whole_decoder(model, settings.projector)
    else:
        trained = with_adapters(model, settings.lora, settings.projector)
        patch(trained, resolved)  # whose save_pretrained is the one that is called
    log = StepLog(out / LOG, on_step)
    trainer = PlanTrainer(
        trained,
        _arguments(out, settings, model, len(conversations), asked is not None),
        data_collator=Collator(encoder, teacher),
        train_dataset=Numbered(conversations),
        eval_dataset=None if asked is None else Numbered(asked, held_out=True),
        processing_class=processor,
        compute_metrics=shares,
        callbacks=[log],
        distill=settings.distill,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        log.go_on_from(0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1]))
        with replaced(out / FACTS) as new:
            new.write_text(json.dumps(facts, indent=2) + "\n")
    if asked is not None:
        trainer.add_callback(EvaluatedBefore(trainer))
    if checkpoint is not None and settings.lora is None:
        _load_weights(model, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(out))
    parameters = list(trained.parameters())
    return {
        "out": str(out),
        "plan": resolved.name,
        "steps": trainer.state.global_step,
        "conversations": len(conversations),
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "log": read_log(out / LOG) if trainer.is_world_process_zero() else [],
    }


def _read(data, images) -> Sequence[Conversation] | None:
    return read_conversations(data, images) if isinstance(data, str | Path) else data


def _checkpoint(out: Path, resume: bool) -> str | None:
    """Where a run goes on. Raises PatchError if it would write over another."""
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    if not resume and (last is not None or (out / FACTS).is_file()):
        raise PatchError(f"out: got {str(out)!r} with a training in it, expected resume, or another folder")
    return last


def _check_same(file: Path, facts: dict) -> None:
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, value in facts.items():
        if before.get(name, value) != value:
            raise PlanError(f"{name}: got {value!r}, expected {before[name]!r} as in the run that is gone on with")


def _load_weights(model: nn.Module, checkpoint: str) -> None:
    """The weights of a checkpoint, which the Trainer looks for by the names that the model has now: transformers writes
    those of its older multimodal classes by other ones, and the Trainer goes on without them."""
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def _arguments(out: Path, settings: Settings, model: nn.Module, samples: int, evaluates: bool) -> TrainingArguments:
    more: dict[str, Any] = {}
    if evaluates:
        more |= {"eval_strategy": "steps", "eval_steps": settings.evaluate}
    if settings.checkpointing:
        more |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        str(out),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,  # below 1: a share
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        optim=settings.optimizer,
        bf16=settings.autocast == "bfloat16",
        fp16=settings.autocast == "float16",
        save_steps=settings.save,
        save_total_limit=2,
        logging_steps=settings.log,
        logging_nan_inf_filter=False,
        dataloader_num_workers=settings.workers,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=True,  # a batch of text alone leaves the projector out
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        **more,
    )
