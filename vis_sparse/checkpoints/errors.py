"""Errors of loading and converting checkpoints."""


from huggingface_hub.errors import StrictDataclassError

# What transformers and torch raise for a config.json and for tensors that are not what they say.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)


class CheckpointError(ValueError):
    """A folder that holds no original InternVL2 checkpoint, or one that cannot be converted."""
