"""A checkpoint and its processor for the commands that run one."""

from __future__ import annotations

from ..patches.errors import PatchError

_DTYPES = ("float32", "bfloat16", "float16")


def load_model(name: str, dtype: str, device: str):
    """(model in evaluation mode, processor) of a checkpoint folder or a name that transformers knows."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    if dtype not in _DTYPES:
        raise PatchError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPES)}")
    disable_progress_bar()  # of loading weights; commands show their own
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=getattr(torch, dtype))
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PatchError(f"model: got {name!r}, expected a multimodal checkpoint ({error})") from None
    try:
        return model.eval().to(device), processor
    except (RuntimeError, AssertionError) as error:  # a device that torch does not know, or was built without
        raise PatchError(f"device: got {device!r}, expected one that torch can use ({error})") from None
