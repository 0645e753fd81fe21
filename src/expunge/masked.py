"""The one masked mean of the package: padding never counts.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import torch

from expunge.errors import DataError


def masked_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean of ``values_BT`` over the places where ``mask_BT`` is true, as a float32 scalar.

    Values under a false mask are replaced before the sum, so a NaN in padding stays there and
    sends no gradient.

    Raises:
        DataError: no place counts; a mean over nothing is missing, not zero.
    """
    mask_BT = mask_BT.bool()
    count = int(mask_BT.sum())
    if count == 0:
        raise DataError(
            what="A batch holds no token that counts",
            got=f"a mask of shape {tuple(mask_BT.shape)} that is false everywhere",
            allowed="at least one token besides padding (and besides the first, where left out)",
            fix="drop empty texts, or texts of a single token",
        )
    return torch.where(mask_BT, values_BT.float(), 0.0).sum() / count
