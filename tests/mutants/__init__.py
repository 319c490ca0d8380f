"""Faults that somebody could make, each of which a test must find: `python -m tests.mutants` (`make mutants`).

When code moves, its mutants move with it: `tests/test_mutants.py` holds that each still applies exactly once.
"""

from . import executor_caches, executor_lanes, layout, patches, serving

MUTANTS = (*executor_caches.MUTANTS, *executor_lanes.MUTANTS, *layout.MUTANTS, *patches.MUTANTS, *serving.MUTANTS)
