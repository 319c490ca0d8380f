"""What a fine-tuning is told."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.training_args import OptimizerNames

from ..plans.layer_plan import PlanError, brief, is_number


@dataclass(frozen=True)
class Settings:
    """Settings of a fine-tuning; the defaults are LLaVA-1.5's (arXiv 2310.03744, appendix), its batch of 128 apart.

    steps: of the optimizer; None: `epochs` of the data. batch: samples of a process at once, accumulate: batches of a
    step. rate: the highest learning rate; None: 2e-5, or 2e-4 for adapters. It rises over `warmup` of the steps and
    falls with a cosine. lora: rank of adapters on the decoder's linear layers (alpha is twice the rank); None: all of
    the decoder trains. projector: whether what is between tower and decoder trains too. The tower never does.
    autocast: "bfloat16", "float16" or None. checkpointing: activations are computed again in the backward pass.
    distill: weight in [0, 1] of KL(dense || plan) at the answers' tokens beside the labels' cross-entropy. top: the
    dense model's most likely tokens that are kept for it, `cache_bytes` on disk at most. optimizer: its name in
    transformers' TrainingArguments. most_tokens: of a sequence. save, evaluate, log: every so many steps. workers:
    processes that prepare batches.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch: int = 4
    accumulate: int = 1
    rate: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw_torch"
    lora: int | None = None
    projector: bool = True
    autocast: str | None = None
    checkpointing: bool = False
    distill: float = 0.0
    top: int = 32
    cache_bytes: int = 50 << 30
    most_tokens: int | None = None
    save: int = 500
    evaluate: int = 500
    log: int = 10
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "lora", "top", "most_tokens", "save", "evaluate", "log"):
            value = getattr(self, name)
            if value is None and name in ("steps", "lora", "most_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"{name}: got {brief(value)}, expected an integer >= 1")
        if not is_number(self.distill) or not 0 <= self.distill <= 1:
            raise PlanError(f"distill: got {brief(self.distill)}, expected a weight in [0, 1]")
        for name in ("epochs", "rate"):
            value = getattr(self, name)
            if not (name == "rate" and value is None) and not (is_number(value) and value > 0):
                raise PlanError(f"{name}: got {brief(value)}, expected a number above 0")
        if self.optimizer not in {name.value for name in OptimizerNames}:
            raise PlanError(f"optimizer: got {brief(self.optimizer)}, expected a name that transformers' Trainer knows")
        if self.autocast not in (None, "bfloat16", "float16"):
            raise PlanError(f"autocast: got {brief(self.autocast)}, expected bfloat16, float16 or none")

    @property
    def learning_rate(self) -> float:
        if self.rate is not None:
            return self.rate
        return 2e-5 if self.lora is None else 2e-4
