"""The small models by name: one module each, with the same names in it.

NAME, TITLE: in code and for readers. MODEL: the class. SIZES: (height, width) of the images it is asked about, empty
for 96x96 as drawn. PATCH: pixels a side of a visual token. BEFORE, AFTER: ids of the tokens around an image. prompt,
processor, new_model, save: for everybody. pixels, visual_tokens, places, positions: for training, which does not go
through the processor; they are told an image's size as a `grid` (height, width) of visual tokens.
"""

from types import ModuleType

from PIL import Image

from vis_sparse.eval.tiny import data, model_internvl, model_llava, model_qwen2_vl, model_smol
from vis_sparse.eval.tiny.reading import READING

FAMILIES = {family.NAME: family for family in (model_llava, model_qwen2_vl, model_internvl, model_smol)}


def family_of(model) -> ModuleType:
    config = model.config
    is_deep = config.model_type == "llava" and config.text_config.hidden_size == model_smol.WIDTH
    return model_smol if is_deep else FAMILIES[config.model_type]


def kinds_of(family: ModuleType) -> tuple[str, ...]:
    """The kinds of single questions that a model was trained on."""
    return (*data.KINDS, READING) if family is model_smol else data.KINDS


def grid_of(image: Image.Image, family: ModuleType) -> tuple[int, int]:
    """An image's (height, width) in visual tokens."""
    return image.height // family.PATCH, image.width // family.PATCH
