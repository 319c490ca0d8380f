"""vis_sparse in lmms-eval: its own model classes, patched, with the cost of every sample beside its score.

`lmms-eval --model vis_sparse --model_args pretrained=CHECKPOINT,plan=yopo-12,calibration=FILE --tasks ...` works where
lmms-eval and vis_sparse are installed (`pip install vis-sparse[eval]`): the entry point of the group `lmms_eval.models`
is `manifest`.
"""


def manifest():
    """What lmms-eval's registry wants to know."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vis_sparse",
        simple_class_path=f"{__name__}.model.SimpleVisSparse",
        chat_class_path=f"{__name__}.model.VisSparse",
    )
