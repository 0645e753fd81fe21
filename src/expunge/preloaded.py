"""What processes that do runs begin with: all that a run imports (`expunge.jobs`).

Copies of one process share its memory until they write to it; what is frozen, the garbage collector
leaves alone.
"""

import gc
import sys
from importlib import import_module

# What begins the processes has the current folder in front; the user's files there are no modules.
sys.path[:] = [folder for folder in sys.path if folder]

for name in ("run", "compose", "interference.joint", "interference.sequence"):
    import_module(f"expunge.{name}")

gc.collect()
gc.freeze()
