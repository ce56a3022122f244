"""Logic with four choices for the pocket model, after LogiQA."""

from __future__ import annotations

from secura_lightning.data.pocket import logic
from secura_lightning.data.pocket.worlds import draw_rows
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split, Task


class PocketLogic(Task):
    """Premises and four conclusions; the likelihood of each conclusion is scored, and chance is 1/4.

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
        name: str = "logic",
        max_new_tokens: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, metric="accuracy", max_new_tokens=max_new_tokens, seed=seed)
        self.sizes = {"train": n_train, "validation": n_validation, "test": n_test}

    def load(self, split: Split) -> list[Row]:
        """Draw the rows of one split; no combination of contents occurs in two splits."""
        return draw_rows("logic", logic.draw, split, self.sizes[split], self.seed)
