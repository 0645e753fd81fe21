"""Shared set-up: one thread, so that numbers repeat and parallel test runs do not fight."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
