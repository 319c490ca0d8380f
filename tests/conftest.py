"""Settings of every test: no network, and one thread a process, since the tests run in several processes."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
