"""Word-problem arithmetic for the pocket model, after GSM8K."""

from __future__ import annotations

from secura_lightning.data.pocket import arithmetic
from secura_lightning.data.pocket.worlds import draw_rows
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split, Task


class PocketArithmetic(Task):
    """Word problems of one or two steps, scored by the final number.

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
        name: str = "arithmetic",
        max_new_tokens: int = 40,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, metric="numeric", max_new_tokens=max_new_tokens, seed=seed)
        self.sizes = {"train": n_train, "validation": n_validation, "test": n_test}

    def load(self, split: Split) -> list[Row]:
        """Draw the rows of one split; no combination of contents occurs in two splits."""
        return draw_rows("arithmetic", arithmetic.draw, split, self.sizes[split], self.seed)
