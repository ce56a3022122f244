"""Logic with four choices for the pocket model, after LogiQA."""

from __future__ import annotations

from secura_lightning.data.pocket import logic
from secura_lightning.data.pocket.task import PocketTask


class PocketLogic(PocketTask):
    """Premises and four conclusions; the likelihood of each conclusion is scored, and chance is 1/4."""

    world = "logic"
    world_metric = "accuracy"
    answer_tokens = 16
    draw = staticmethod(logic.draw)
