"""A checkpoint's files."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from vis_sparse.eval.tiny.words import BOS, EOS, PAD


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    settings: PreTrainedConfig,
    processor: ProcessorMixin,
    published_name: Callable[[str], str],
) -> None:
    """Write config, processor, generation config and fp16 weights, each under `published_name` of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    settings.architectures = [type(model).__name__]
    settings.dtype = torch.float16
    settings.save_pretrained(folder)
    processor.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=4, do_sample=False
    ).save_pretrained(folder)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied to the word embeddings
            tensors[published_name(name)] = tensor.detach().to(torch.float16).contiguous()
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors lets nobody else read its files
