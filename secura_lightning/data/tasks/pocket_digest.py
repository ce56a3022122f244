"""Digests of little news articles for the pocket model, after CNN/DailyMail."""

from __future__ import annotations

from secura_lightning.data.pocket import digest
from secura_lightning.data.pocket.worlds import draw_rows
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split, Task


class PocketDigest(Task):
    """Articles of three to five sentences and their highlight, scored by ROUGE-L.

    Args:
        n_train: Training rows.
        n_validation: Validation rows.
        n_test: Test rows.
        name: Name of the task: its column of the matrix.
        max_new_tokens: Longest generated answer, in tokens.
        seed: Seed of the rows. Which combinations belong to which split does not depend on it.
    """

    def __init__(
        self,
        n_train: int = 2000,
        n_validation: int = 100,
        n_test: int = 100,
        name: str = "digest",
        max_new_tokens: int = 24,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, metric="rougeL", max_new_tokens=max_new_tokens, seed=seed)
        self.sizes = {"train": n_train, "validation": n_validation, "test": n_test}

    def load(self, split: Split) -> list[Row]:
        """Draw the rows of one split; no combination of contents occurs in two splits."""
        return draw_rows("digest", digest.draw, split, self.sizes[split], self.seed)
