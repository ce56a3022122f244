"""From a generator of samples to the rows of a split, such that no split can be memorised from another.

Every sample carries a *key*: the combination of contents that makes it (who does what, which numbers). A hash of the
key says which split the sample belongs to, whatever the seed, so that a combination seen in training never comes back
in validation or test, in no wording.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split
from secura_lightning.errors import SecuraError

PARTS = 10  # one part of the keys is for test, one for validation, the rest for training
PATIENCE = 50_000  # draws without a new row after which the world counts as exhausted


@dataclass(frozen=True, slots=True)
class Sample:
    """One drawn example and the key of its content."""

    key: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    kind: str = ""


def split_of(key: str) -> Split:
    """The split that a combination of contents belongs to."""
    part = zlib.crc32(key.encode()) % PARTS
    return "test" if part == 0 else "validation" if part == 1 else "train"


def draw_rows(name: str, draw: Callable[[random.Random], Sample], split: Split, count: int, seed: int) -> list[Row]:
    """``count`` rows of a split, no prompt twice.

    Raises:
        SecuraError: The world has no ``count`` different rows for this split.
    """
    rng = random.Random(f"{name}/{split}/{seed}")
    found: dict[str, Row] = {}
    misses = 0
    while len(found) < count:
        sample = draw(rng)
        if split_of(sample.key) != split or sample.prompt in found:
            misses += 1
            if misses > PATIENCE:
                raise SecuraError(
                    f"{name}: n_{split}={count} is more than its world holds; at most {len(found)} came up"
                )
            continue
        misses = 0
        row = Row(f"{name}/{split}/{len(found)}", sample.prompt, sample.answer, sample.choices, sample.kind)
        found[sample.prompt] = row
    return list(found.values())
