"""Errors of loading and converting checkpoints."""


class CheckpointError(ValueError):
    """A folder that holds no original InternVL2 checkpoint, or one that cannot be converted."""
