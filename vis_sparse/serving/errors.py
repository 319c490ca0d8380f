"""Errors of serving under a plan."""


class ServingError(ValueError):
    """An engine, a model, a plan or a request that cannot be served under a plan. Says what to do instead."""
