"""Which of lmms-eval's model classes runs a checkpoint."""

from __future__ import annotations

from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from transformers import AutoConfig, AutoModelForImageTextToText

from ...checkpoints.errors import MALFORMED
from ...patches.errors import PatchError
from ...plans.layer_plan import reason

# model_type of a checkpoint's config -> name of lmms-eval's model
BASES = {
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_next_video": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "vipllava": "llava_hf",
}


def base_class(pretrained: str, name: str | None = None, simple: bool = False) -> type[lmms]:
    """lmms-eval's model class for the checkpoint `pretrained`.

    name: of lmms-eval's model, to override the choice by the checkpoint's model_type. simple: the class for plain
    prompts where there is one, not the one for chat messages. Raises PatchError.
    """
    try:
        kind = AutoConfig.from_pretrained(pretrained).model_type
    except (*MALFORMED, OSError) as error:
        raise PatchError(f"model: got {pretrained!r}, expected a multimodal checkpoint ({reason(error)})") from None
    if name is None:
        if kind not in BASES:
            raise PatchError(
                f"pretrained: got a checkpoint of model_type {kind!r}, expected one of {', '.join(BASES)}; or name "
                "lmms-eval's model for it with base="
            )
        name = BASES[kind]
    try:
        found = MODEL_REGISTRY_V2.get_model_class(name, force_simple=simple)
    except ValueError:
        raise PatchError(f"base: got {name!r}, expected the name of one of lmms-eval's models") from None
    if name == "llava_hf":
        # its code suits every processor with a chat template; it only names few classes
        from lmms_eval.models.simple.llava_hf import model_map

        model_map.setdefault(kind, AutoModelForImageTextToText)
    return found
