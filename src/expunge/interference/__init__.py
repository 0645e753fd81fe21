"""Two functions removed from one model by training: jointly, or one after the other.

The third way, adding up patches that were trained apart, is `expunge.compose`.
"""

from expunge.interference.joint import joint
from expunge.interference.measured import measured_by_each
from expunge.interference.sequence import sequence

__all__ = ["joint", "measured_by_each", "sequence"]
