"""Tasks and a probe small enough for a test, over the pocket tokenizer."""

from __future__ import annotations

import random

from secura_lightning.data.probe import Probe
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split, Task


class TinyTask(Task):
    """Repeat a word after a prefix that names the task."""

    def __init__(self, name: str = "tiny", rows: int = 24, seed: int = 0) -> None:
        super().__init__(name=name, metric="exact", max_new_tokens=4, seed=seed)
        self.n = rows

    def load(self, split: Split) -> list[Row]:
        rng = random.Random(f"{self.name}/{split}/{self.seed}")
        words = ("red", "green", "blue", "dog", "house", "seven", "garden", "old friend", "a b c d")
        count = self.n if split == "train" else 6
        return [
            Row(f"{split}/{i}", f"{self.name} {rng.randint(0, 99)}: {(w := rng.choice(words))}", w)
            for i in range(count)
        ]


class TinyProbe(Probe):
    """Two kinds of questions, one of each style, and two texts."""

    def __init__(self) -> None:
        super().__init__("tiny probe", max_new_tokens=3)

    def rows(self) -> list[Row]:
        return [
            *(Row(f"a{i}", f"{i} plus 1 is", str(i + 1), (str(i), str(i + 1), "cat"), "choice") for i in range(4)),
            *(Row(f"b{i}", f"say {i}", str(i), kind="exact") for i in range(4)),
        ]

    def texts(self) -> list[str]:
        return ["The sky is blue.", "One day Tom went to the park with his dog."]
