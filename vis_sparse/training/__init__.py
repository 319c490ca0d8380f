"""Fine-tuning under a plan: LLaVA's conversations, transformers' Trainer, and distillation from the dense model."""
