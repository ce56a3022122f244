"""Digests of little news articles for the pocket model, after CNN/DailyMail."""

from __future__ import annotations

from secura_lightning.data.pocket import digest
from secura_lightning.data.pocket.task import PocketTask


class PocketDigest(PocketTask):
    """Articles of three to five sentences and their highlight, scored by ROUGE-L."""

    world = "digest"
    world_metric = "rougeL"
    answer_tokens = 24
    draw = staticmethod(digest.draw)
