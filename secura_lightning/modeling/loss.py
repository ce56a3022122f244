"""Next-token cross-entropy, summed, so that the caller decides what to normalise by."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from secura_lightning.data.encode import IGNORED


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over trained tokens of -log p(token | before).

    Args:
        logits: ``[b, t, v]``; position i predicts label i + 1.
        labels: ``[b, t]``, :data:`IGNORED` where nothing is trained.

    Returns:
        A scalar in fp32 (or fp64 for fp64 logits).
    """
    targets = labels[:, 1:]
    trained = targets != IGNORED
    picked = logits[:, :-1][trained]  # [n, v]: prompts and padding never enter the softmax
    picked = picked if picked.dtype.itemsize > 4 else picked.float()
    return F.cross_entropy(picked, targets[trained], reduction="sum")
