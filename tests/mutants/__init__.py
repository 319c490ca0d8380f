"""Faults that somebody could make, each of which a test must find: `python -m tests.mutants` (`make mutants`).

When code moves, its mutants move with it: `tests/test_mutants.py` holds that each still applies exactly once.
"""

from . import before, executor_caches, executor_lanes, layout, patches, serving

_PARTS = (before, executor_caches, executor_lanes, layout, patches, serving)
MUTANTS = tuple(mutant for part in _PARTS for mutant in part.MUTANTS)
