"""Errors of patching and of calls that a patched model cannot serve."""


class PatchError(ValueError):
    """A model that cannot be patched, or a call that a patched model does not support."""
