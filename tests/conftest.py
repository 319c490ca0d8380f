"""Settings of every test: no network, one thread a process (the tests run in several), the same examples each run; and
which cases of large tables run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import settings

from .marks import left_out

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every slow case of tests that have very many")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    out = set(left_out(items))
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]
