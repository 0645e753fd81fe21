"""Shared set-up: one thread, so that numbers repeat and parallel test runs do not fight."""

from __future__ import annotations

import os

import torch
from threadpoolctl import threadpool_limits

# Tests compare what they compute with what processes do that they begin: on some CPUs, sums of two
# threads are rounded otherwise. What is loaded already no longer reads the variable.
os.environ["OMP_NUM_THREADS"] = "1"
threadpool_limits(1)
torch.set_num_threads(1)
