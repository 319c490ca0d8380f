"""A checkpoint and its processor for the commands that run one."""

from __future__ import annotations

from ..checkpoints.errors import MALFORMED, CheckpointError
from ..checkpoints.loaded import check_loaded
from ..patches.errors import PatchError
from ..plans.layer_plan import brief, reason

_DTYPES = ("float32", "bfloat16", "float16")


def load_model(name: str, dtype: str, device: str):
    """(model in evaluation mode, processor) of a checkpoint folder or a name that transformers knows."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    if dtype not in _DTYPES:
        raise PatchError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPES)}")
    disable_progress_bar()  # of loading weights; commands show their own
    try:
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True
        )
        check_loaded(name, loaded)
        processor = AutoProcessor.from_pretrained(name)
    except (*MALFORMED, OSError, SafetensorError, ImportError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise PatchError(f"model: got {brief(name)}, expected a multimodal checkpoint ({reason(error)})") from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise PatchError(
            f"model: got {brief(name)} without a processor of images and text, expected one beside the model"
        )
    try:
        return model.eval().to(device), processor
    except (RuntimeError, AssertionError) as error:  # a device that torch does not know, or was built without
        raise PatchError(f"device: got {device!r}, expected one that torch can use ({reason(error)})") from None
