"""Shapes of shipped names, checkpoint folders and live models."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml

from ..layout.image_grids import IMAGE_RULES, ShapeError
from ..layout.video_grids import VIDEO_RULES
from ..plans.atomic_write import is_file
from ..plans.layer_plan import brief
from .shape_config import shape_of_config, shape_of_folder
from .shapes import ModelShape, VisionShape, frozen

SHAPES = Path(__file__).parents[1] / "configs" / "shapes"


def shape_names() -> list[str]:
    """Names of the shipped shapes."""
    return sorted(path.stem for path in SHAPES.glob("*.yaml"))


def load_shape(source: str | Path) -> ModelShape:
    """The shipped shape called `source`, or that of a folder with a transformers `config.json`."""
    if isinstance(source, str) and source in shape_names():
        return _from_yaml(SHAPES / f"{source}.yaml")
    if isinstance(source, str | Path) and is_file(Path(source) / "config.json"):
        return shape_of_folder(Path(source))
    near = difflib.get_close_matches(str(source), shape_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(shape_names())
    raise ShapeError(f"model: got {brief(str(source))}, expected a folder with a config.json or one of {known}{hint}")


def shape_of(model) -> ModelShape:
    """The shape of a live transformers model, multimodal or a bare language model."""
    config = getattr(model, "config", None)
    if config is None:
        raise ShapeError(
            f"model: got {type(model).__name__}, expected a transformers model, a shape, a name or a folder"
        )
    return shape_of_config(config, type(model).__name__)


def as_shape(source) -> ModelShape:
    """`source` (shape, shipped name, folder or live model) as a shape."""
    if isinstance(source, ModelShape):
        return source
    return load_shape(source) if isinstance(source, str | Path) else shape_of(source)


def _from_yaml(path: Path) -> ModelShape:
    data = yaml.safe_load(path.read_text())
    vision = VisionShape(**{name: frozen(value) for name, value in data.pop("vision").items()})
    projector = tuple(tuple(matrix) for matrix in data.pop("projector"))
    image = _rule(IMAGE_RULES, **data.pop("image"))
    video = _rule(VIDEO_RULES, **data.pop("video")) if "video" in data else None
    return ModelShape(**data, vision=vision, projector=projector, image=image, video=video)


def _rule(rules: dict, rule: str, **settings):
    """The rule called `rule` with its settings, lists turned into tuples."""
    return rules[rule](**{key: frozen(value) for key, value in settings.items()})
