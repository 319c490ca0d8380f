"""Training of `tiny/smol`, the shipped model with a real pretrained decoder."""
