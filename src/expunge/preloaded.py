"""What processes that do runs begin with: all that a run imports (`expunge.jobs`).

Copies of one process share its memory until they write to it; what is frozen, the garbage collector
leaves alone.
"""

import gc

import expunge.compose
import expunge.interference.joint
import expunge.interference.sequence
import expunge.run

__all__ = ["expunge"]

gc.collect()
gc.freeze()
