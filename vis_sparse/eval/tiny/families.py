"""The small models by name: one module each, with the same names in it.

NAME, TITLE: in code and for readers. MODEL: the class. SIZES: (height, width) of the images it is asked about, empty
for 96x96 as drawn. PATCH: pixels a side of a visual token. BEFORE, AFTER: ids of the tokens around an image. prompt,
processor, new_model, save: for everybody. pixels, visual_tokens, positions: for training, which does not go through the
processor.
"""

from types import ModuleType

from vis_sparse.eval.tiny import model_llava, model_qwen2_vl

FAMILIES = {family.NAME: family for family in (model_llava, model_qwen2_vl)}


def family_of(model) -> ModuleType:
    return FAMILIES[model.config.model_type]
