"""Checkpoints of other formats, converted to what transformers loads."""
