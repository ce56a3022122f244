"""Word-problem arithmetic for the pocket model, after GSM8K."""

from __future__ import annotations

from secura_lightning.data.pocket import arithmetic
from secura_lightning.data.pocket.task import PocketTask


class PocketArithmetic(PocketTask):
    """Word problems of one or two steps, scored by the final number."""

    world = "arithmetic"
    world_metric = "numeric"
    answer_tokens = 40
    draw = staticmethod(arithmetic.draw)
