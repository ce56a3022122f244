"""English news sentences and their German for the pocket model, after NewsDE."""

from __future__ import annotations

from secura_lightning.data.pocket import german
from secura_lightning.data.pocket.task import PocketTask


class PocketGerman(PocketTask):
    """English-to-German news sentences, scored by chrF."""

    world = "german"
    world_metric = "chrf"
    answer_tokens = 40
    draw = staticmethod(german.draw)
