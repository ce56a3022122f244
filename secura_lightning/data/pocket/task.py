"""What the four tasks of the pocket model share: rows drawn from a world of their own, in three sizes."""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import ClassVar

from secura_lightning.data.pocket.worlds import Sample, draw_rows
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split, Task


class PocketTask(Task):
    """Generated rows; no combination of contents occurs in two splits.

    Args:
        n_train: Training rows.
        n_validation: Validation rows.
        n_test: Test rows.
        name: Name of the task, its column of the matrix; the world's by default.
        max_new_tokens: Longest generated answer, in tokens; null for what the world's answers need.
        seed: Seed of the rows. Which combinations belong to which split does not depend on it.
    """

    world: ClassVar[str]
    """Name of the world, the seed of its draws."""
    world_metric: ClassVar[str]
    answer_tokens: ClassVar[int]
    """Tokens that no answer of the world exceeds."""

    def __init__(
        self,
        n_train: int = 2000,
        n_validation: int = 100,
        n_test: int = 100,
        name: str | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            name=name or self.world,
            metric=self.world_metric,
            max_new_tokens=max_new_tokens or self.answer_tokens,
            seed=seed,
        )
        self.sizes: dict[Split, int] = {"train": n_train, "validation": n_validation, "test": n_test}

    @staticmethod
    @abstractmethod
    def draw(rng: random.Random) -> Sample:
        """Draw one example of the world."""

    def load(self, split: Split) -> list[Row]:
        """Draw the rows of one split."""
        return draw_rows(self.world, self.draw, split, self.sizes[split], self.seed)
