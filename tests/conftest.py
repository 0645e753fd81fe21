"""Shared set-up: one thread, so that numbers repeat and parallel test runs do not fight."""

from __future__ import annotations

import os

import torch

# Of the processes that tests begin, too: sums of two threads are rounded otherwise on some CPUs.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
