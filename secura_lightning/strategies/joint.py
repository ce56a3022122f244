"""Fresh and replayed rows in one forward, where that is the same work.

    fresh    [b, t]     a a a . |
    replayed [r, u]     b b     |  ->  one batch [b + r, max(t, u)], whose loss is summed part by part

Two small forwards cost more than one twice as large: every call of a layer has a price of its own, and an adapter that
builds its dense change (S-MagNorm ``element``) builds it once a forward. Padding costs too, so parts whose lengths are
too far apart stay apart. Rows do not see each other, so the losses are the same either way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secura_lightning.data.encode import IGNORED

_SPARE = 256  # positions of padding that cost less than a forward of their own
_SHARE = 8  # of a larger batch, padding of one part in so many


def join(fresh: dict[str, Any], beside: dict[str, Tensor], pad: int) -> dict[str, Tensor] | None:
    """Two batches of rows as one, those of ``fresh`` first; None where too much of it would be padding.

    Args:
        fresh: ``input_ids``, ``attention_mask`` and ``labels``, ``[b, t]``; packed rows are never joined.
        beside: The same of other rows, ``[r, u]``.
        pad: Token id that fills short rows.

    Returns:
        The three as ``[b + r, max(t, u)]``.
    """
    if "position_ids" in fresh:
        return None
    shapes = [batch["input_ids"].shape for batch in (fresh, beside)]
    width = max(columns for _, columns in shapes)
    alone = sum(rows * columns for rows, columns in shapes)
    if sum(rows for rows, _ in shapes) * width - alone > max(_SPARE, alone // _SHARE):
        return None

    def wide(tensor: Tensor, fill: int) -> Tensor:
        return F.pad(tensor, (0, width - tensor.shape[1]), value=fill)

    fills = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
    return {name: torch.cat([wide(batch[name], fill) for batch in (fresh, beside)]) for name, fill in fills.items()}
